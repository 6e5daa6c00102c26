package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func newDrainCommand(g *globals) *cobra.Command {
	var deadline, maxBlackout time.Duration
	cmd := &cobra.Command{
		Use:   "drain NODE",
		Short: "Cordon a host and move everything off it",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if maxBlackout < time.Millisecond || deadline < 0 {
				return usagef("--max-blackout: at least 1ms; --deadline: not negative")
			}
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			p := &shared{p: newProgress(os.Stderr)}
			d := draining{client: client, progress: p, node: args[0]}
			req := &v1.DrainRequest{Node: args[0], DeadlineMs: deadline.Milliseconds()}
			if cmd.Flags().Changed("max-blackout") {
				req.MaxBlackoutMs = maxBlackout.Milliseconds()
			}
			res, err := d.follow(cmd.Context(), req)
			p.end()
			if err != nil {
				return err
			}
			return reportDrain(cmd, g.output, control.DrainOf(res))
		},
	}
	cmd.Flags().DurationVar(&deadline, "deadline", 0, "stop when it takes longer (default: never)")
	cmd.Flags().DurationVar(&maxBlackout, "max-blackout", 300*time.Millisecond, "as of tranship migrate, for each shard; what a workload says comes before the default")
	return cmd
}

// draining follows a drain to its end. Ctrl-C, or --timeout, asks the host to
// stop, and the following goes on: only the host knows what stayed.
type draining struct {
	client   *control.Client
	progress progress
	node     string
}

func (d *draining) follow(ctx context.Context, req *v1.DrainRequest) (*v1.DrainResult, error) {
	sctx, leave := context.WithCancel(context.WithoutCancel(ctx))
	defer leave()
	stream, err := d.client.Nodes.Drain(sctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	var work sync.WaitGroup
	defer work.Wait()
	over := make(chan struct{})
	defer close(over)
	work.Go(func() { d.stopWhen(ctx, sctx, leave, over) })
	var res *v1.DrainResult
	for stream.Receive() {
		e := stream.Msg()
		switch {
		case e.GetResult() != nil:
			res = e.GetResult()
		case e.GetProgress() != nil:
			d.progress.show(e.GetProgress())
		case e.GetNote() != "":
			d.progress.say(fmt.Sprintf("[%d/%d] %s", e.GetDone(), e.GetAll(), e.GetNote()))
		case e.GetTo() != "":
			d.progress.say(fmt.Sprintf("[%d/%d] %s → %s", e.GetDone(), e.GetAll(), e.GetShard(), e.GetTo()))
		}
	}
	if res != nil {
		return res, nil
	}
	if err := stream.Err(); err != nil {
		if sctx.Err() != nil {
			return nil, &exitError{code: exitInDoubt, err: fmt.Errorf("left while %s was stopping its drain; see tranship ps --node and tranship migrations there", d.node)}
		}
		return nil, err
	}
	return nil, errors.New("the drain ended without a result")
}

// stopWhen asks the host to stop once ctx ends, and leaves at a second Ctrl-C.
func (d *draining) stopWhen(ctx, sctx context.Context, leave func(), over <-chan struct{}) {
	select {
	case <-over:
		return
	case <-ctx.Done():
	}
	again := make(chan os.Signal, 1)
	signal.Notify(again, os.Interrupt)
	defer signal.Stop(again)
	d.progress.say("stopping; waiting for what is on its way")
	req := &v1.StopDrainRequest{Node: d.node, Deadline: errors.Is(ctx.Err(), context.DeadlineExceeded)}
	if _, err := d.client.Nodes.StopDrain(sctx, connect.NewRequest(req)); err != nil && sctx.Err() == nil {
		d.progress.say("stop: " + explain(err, ""))
	}
	select {
	case <-over:
	case <-again:
		leave()
	}
}

// reportDrain prints the result and turns it into an exit code.
func reportDrain(cmd *cobra.Command, output string, doc control.DrainDocument) error {
	if output == outputJSON {
		if err := printJSON(cmd.OutOrStdout(), doc); err != nil {
			return err
		}
	} else if len(doc.Moved)+len(doc.Stayed) > 0 {
		var rows [][]string
		for _, s := range doc.Moved {
			rows = append(rows, []string{s.Name, s.Namespace, s.To, fmt.Sprintf("%.0fms", s.BlackoutMs), ""})
		}
		for _, s := range doc.Stayed {
			rows = append(rows, []string{s.Name, s.Namespace, doc.Node, "", s.Reason})
		}
		if err := printTable(cmd.OutOrStdout(), []string{"SHARD", "NAMESPACE", "NOW ON", "BLACKOUT", "WHY IT STAYED"}, rows); err != nil {
			return err
		}
	}
	code := map[string]int{
		"done": exitDone, "refused": exitRefused, "cancelled": exitCancelled, "deadline": exitDeadline, "in-doubt": exitInDoubt,
	}
	exit, ok := code[doc.Outcome]
	if !ok {
		exit = exitFailed
	}
	if exit == exitDone {
		return nil
	}
	next := "tranship check SHARD NODE says more"
	if exit == exitInDoubt {
		next = "tranship migrations on " + doc.Node + " says what to do"
	}
	return &exitError{code: exit, err: fmt.Errorf("%s is not empty (%s): %d shards moved, %d stay and run; it stays cordoned (tranship uncordon %s); %s",
		doc.Node, doc.Outcome, len(doc.Moved), len(doc.Stayed), doc.Node, next)}
}
