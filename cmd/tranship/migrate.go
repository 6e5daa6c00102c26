package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func newMigrateCommand(g *globals) *cobra.Command {
	var bandwidth string
	var maxBlackout, deadline time.Duration
	req := &v1.MigrateRequest{}
	cmd := &cobra.Command{
		Use:   "migrate SHARD NODE",
		Short: "Move a running shard to another host",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if maxBlackout < time.Millisecond || deadline < time.Millisecond {
				return usagef("--max-blackout and --deadline: at least 1ms")
			}
			if bandwidth != "" {
				rate, err := parseRate(bandwidth)
				if err != nil {
					return usagef("--bandwidth: %w", err)
				}
				req.BandwidthBitsPerSecond = rate
			}
			client, err := g.acting()
			if err != nil {
				return err
			}
			defer client.Close()
			req.Namespace, req.Shard, req.Node, req.ForceNamespace = g.namespace, args[0], args[1], g.forceNamespace
			req.DeadlineMs = deadline.Milliseconds()
			if cmd.Flags().Changed("max-blackout") { // else a workload may have said it
				req.MaxBlackoutMs = maxBlackout.Milliseconds()
			}
			m := migration{client: client, progress: newProgress(os.Stderr)}
			end, err := m.follow(cmd.Context(), req)
			m.progress.end()
			if err != nil {
				return err
			}
			if cmd.Context().Err() == context.DeadlineExceeded && end.result.GetCode() == codeCancelled {
				end.result.Code = codeDeadline // it was --timeout that asked
			}
			return reportMigration(cmd, g.output, req, end)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&req.Mode, "mode", "precopy", "precopy, postcopy or stop")
	flags.DurationVar(&maxBlackout, "max-blackout", 300*time.Millisecond, "freeze only once the rest can be sent in this time; what the shard's workload says comes before the default")
	flags.StringVar(&bandwidth, "bandwidth", "", "limit of what is sent, like 500mbit or 50MB/s (default: none)")
	flags.DurationVar(&deadline, "deadline", 5*time.Minute, "abort when it takes longer")
	flags.BoolVar(&req.NoThrottle, "no-throttle", false, "do not slow a shard that writes faster than the link carries")
	flags.BoolVar(&req.DryRun, "dry-run", false, "check only, and move nothing")
	return cmd
}

// migration follows one migration from the request to its end:
//
//  1. events are shown as progress until the one with the result
//  2. Ctrl-C, or --timeout, asks the daemon to cancel, and the following goes
//     on: only the daemon knows whether the shard was handed over by then
//  3. when the stream breaks, the daemon is asked what became of it
type migration struct {
	client   *control.Client
	progress progress
	id       string
}

// ending is how a migration ended, as far as the daemon says.
type ending struct {
	result  *v1.Migration
	refused []*v1.Finding
}

func (m *migration) follow(ctx context.Context, req *v1.MigrateRequest) (ending, error) {
	// The stream outlives ctx: leaving would not end the migration.
	sctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	stream, err := m.client.Migrations.Migrate(sctx, connect.NewRequest(req))
	if err != nil {
		return ending{}, err
	}
	events := make(chan *v1.MigrateEvent)
	go func() {
		defer close(events)
		for stream.Receive() {
			select {
			case events <- stream.Msg():
			case <-sctx.Done():
				return
			}
		}
	}()
	var work sync.WaitGroup
	defer func() { // wait for the goroutines, whatever ended the loop
		stop()
		for range events {
		}
		work.Wait()
		stream.Close()
	}()
	var end ending
	interrupted, again := ctx.Done(), make(chan os.Signal, 1)
	defer signal.Stop(again)
	var wanted, committed bool
	cancelled := make(chan error, 1)
	for {
		select {
		case event, ok := <-events:
			if !ok {
				if end.result != nil || end.refused != nil {
					return end, nil
				}
				return m.lost(sctx, stream.Err())
			}
			if id := event.GetProgress().GetId(); id != "" {
				m.id = id
			}
			if event.GetResult() != nil || event.GetRefused() != nil {
				end = ending{event.GetResult(), event.GetRefused()}
				continue
			}
			m.progress.show(event.GetProgress())
		case <-interrupted:
			interrupted, wanted = nil, true
			m.progress.say("cancelling; waiting for the source to run as before")
			signal.Notify(again, os.Interrupt)
		case <-again:
			if committed {
				return ending{}, &exitError{code: exitInDoubt, err: fmt.Errorf("left; %s goes on, see tranship migrations %s", m.id, m.id)}
			}
			return ending{}, &exitError{code: exitInDoubt, err: fmt.Errorf("left while %s was being cancelled; see tranship migrations %s", m.id, m.id)}
		case err := <-cancelled:
			if err != nil {
				committed = connect.CodeOf(err) == connect.CodeFailedPrecondition
				m.progress.say("cancel: " + explain(err, ""))
			}
		}
		if wanted && m.id != "" {
			wanted = false
			id := m.id
			work.Go(func() { // cancelled has room for its one word
				_, err := m.client.Migrations.Cancel(sctx, connect.NewRequest(&v1.CancelRequest{Id: id}))
				cancelled <- err
			})
		}
	}
}

const (
	// A restarted daemon settles its journal before it answers.
	lostWait = 60 * time.Second
	lostPoll = 500 * time.Millisecond
)

// lost finds out what became of a migration whose stream broke.
func (m *migration) lost(ctx context.Context, streamErr error) (ending, error) {
	if streamErr == nil {
		streamErr = errors.New("the daemon ended the answer without a result")
	}
	// What the daemon itself refused has not begun.
	if m.id == "" || !broken(streamErr) {
		return ending{}, streamErr
	}
	m.progress.say("lost the daemon; asking what became of " + m.id)
	ctx, cancel := context.WithTimeout(ctx, lostWait)
	defer cancel()
	tick := time.NewTicker(lostPoll)
	defer tick.Stop()
	for {
		resp, err := m.client.Migrations.ListMigrations(ctx, connect.NewRequest(&v1.ListMigrationsRequest{Id: m.id}))
		if err == nil && len(resp.Msg.GetMigrations()) > 0 {
			if last := resp.Msg.GetMigrations()[0]; last.GetOutcome() != outcomeRunning {
				return ending{result: last}, nil
			}
		}
		select {
		case <-ctx.Done():
			return ending{}, &exitError{code: exitUnreachable, err: fmt.Errorf(
				"the daemon went away while it moved the shard, and does not say what became of it; ask again with tranship migrations %s", m.id)}
		case <-tick.C:
		}
	}
}

// broken tells a cut connection from the daemon's own refusal.
func broken(err error) bool {
	if errors.Is(err, control.ErrUnreachable) || errors.Is(err, io.ErrUnexpectedEOF) {
		return true
	}
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable, connect.CodeUnknown, connect.CodeInternal, connect.CodeCanceled:
		return true
	}
	return false
}

// Outcomes and codes of Migration that the CLI acts on (daemon/migrate).
const (
	outcomeRunning = "running"
	outcomeDone    = "done"
	outcomeAborted = "aborted"
	outcomeInDoubt = "in-doubt"
	codeCancelled  = "cancelled"
	codeDeadline   = "deadline"
	codeRefused    = "refused"
	codePagesLost  = "pages-lost"
	codeReturning  = "returning"
)

// reportMigration prints the result and turns it into an exit code.
func reportMigration(cmd *cobra.Command, output string, req *v1.MigrateRequest, end ending) error {
	doc := control.MigrationDocument{Document: control.NewDocument(), DryRun: req.GetDryRun(), Findings: control.FindingsOf(end.refused)}
	doc.Migration = control.MigrationOf(end.result)
	if end.result == nil {
		doc.Shard, doc.Namespace, doc.To, doc.Mode = req.GetShard(), req.GetNamespace(), req.GetNode(), req.GetMode()
		doc.Outcome = outcomeAborted
	}
	refused := control.Refused(doc.Findings)
	if refused && doc.Code == "" {
		doc.Code, doc.Reason = codeRefused, "refused by pre-flight"
	}
	if output == outputJSON {
		if err := printJSON(cmd.OutOrStdout(), doc); err != nil {
			return err
		}
	}
	if err := printFindingList(cmd.ErrOrStderr(), doc.Findings); err != nil {
		return err
	}
	if output != outputJSON && doc.ID != "" && !req.GetDryRun() && !refused {
		if err := printMigration(cmd.OutOrStdout(), output, doc); err != nil {
			return err
		}
	}
	return outcomeError(doc, refused)
}

// outcomeError is nil for a shard that moved, and for a dry run that found
// nothing against it.
func outcomeError(doc control.MigrationDocument, refused bool) error {
	at := doc.From
	if at == "" {
		at = "its host"
	}
	switch {
	case refused || doc.Code == codeRefused:
		reason := ""
		if len(doc.Findings) == 0 && doc.Reason != "" {
			reason = ": " + doc.Reason
		}
		return &exitError{code: exitRefused, err: fmt.Errorf("%s stays on %s%s", doc.Shard, at, reason)}
	case doc.Outcome == outcomeDone || doc.DryRun:
		return nil
	case doc.Outcome == outcomeInDoubt && doc.Code == codePagesLost:
		return &exitError{code: exitInDoubt, err: fmt.Errorf(
			"%s was lost on %s: %s. %s has it as it was when it was frozen: tranship migrations resolve %s --keep here lets it go on there from then, --keep there gives it up",
			doc.Shard, doc.To, doc.Reason, at, doc.ID)}
	case doc.Outcome == outcomeInDoubt && doc.Code == codeReturning:
		return &exitError{code: exitInDoubt, err: fmt.Errorf("on %s: %s %s", at, doc.Shard, doc.Reason)}
	case doc.Outcome == outcomeInDoubt:
		return &exitError{code: exitInDoubt, err: fmt.Errorf(
			"migration %s is in doubt: %s. The hosts settle it once they reach each other; if one is gone for good, make sure that it is off, then: tranship migrations resolve %s --keep here|there",
			doc.ID, doc.Reason, doc.ID)}
	case doc.Code == codeCancelled:
		return &exitError{code: exitCancelled, err: fmt.Errorf("cancelled: %s runs on %s as before", doc.Shard, at)}
	case doc.Code == codeDeadline:
		return &exitError{code: exitDeadline, err: fmt.Errorf(
			"not done within the deadline: %s runs on %s as before; allow a longer --deadline or --max-blackout", doc.Shard, at)}
	}
	return &exitError{code: exitFailed, err: fmt.Errorf("%s runs on %s as before: %s", doc.Shard, at, doc.Reason)}
}
