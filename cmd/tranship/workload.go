package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/workloads"
)

func newWorkloadCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "workload", Short: "Services that are divided into shards"}
	cmd.AddCommand(newWorkloadApplyCommand(g), newWorkloadLsCommand(g), newWorkloadScaleCommand(g), newWorkloadRmCommand(g))
	return cmd
}

// changing makes changes of workloads, one after another.
type changing struct {
	g      *globals
	cmd    *cobra.Command
	client *control.Client
	dryRun bool
	yes    bool
	in     *os.File
	// planned is what a dry run takes to be there: the next of a file may be near it.
	planned []*v1.PlannedShards
	doc     control.WorkloadChangesDocument
}

func (g *globals) changing(cmd *cobra.Command, dryRun, yes bool) (*changing, error) {
	client, err := g.acting()
	if err != nil {
		return nil, err
	}
	return &changing{
		g: g, cmd: cmd, client: client, dryRun: dryRun, yes: yes, in: os.Stdin,
		doc: control.WorkloadChangesDocument{Document: control.NewDocument(), DryRun: dryRun, Workloads: []control.WorkloadChange{}},
	}, nil
}

func newWorkloadApplyCommand(g *globals) *cobra.Command {
	var path string
	var dryRun, yes bool
	cmd := &cobra.Command{
		Use:   "apply -f FILE",
		Short: "Make the pool run what a file says; shows the difference first",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			specs, err := readWorkloads(path, g.namespace)
			if err != nil {
				return err
			}
			c, err := g.changing(cmd, dryRun, yes)
			if err != nil {
				return err
			}
			defer c.client.Close()
			for _, s := range specs {
				if err = c.change(cmd.Context(), &v1.ChangeWorkloadRequest{Kind: "apply", Name: s.Name, SpecJson: s.Encode()}); err != nil {
					break // the next may be near this one
				}
			}
			return c.report(err)
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&path, "file", "f", "", "the workload file, TOML or YAML; - is standard input")
	flags.BoolVar(&dryRun, "dry-run", false, "show the difference, and do nothing")
	flags.BoolVarP(&yes, "yes", "y", false, "do not ask, on a terminal")
	return cmd
}

// readWorkloads reads a file; what is wrong with it is a wrong usage.
func readWorkloads(path, namespace string) ([]*workloads.Spec, error) {
	if path == "" {
		return nil, usagef("--file is missing: tranship workload apply -f FILE")
	}
	var from io.Reader = os.Stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, usagef("%w", err)
		}
		defer f.Close()
		from = f
	}
	raw, err := io.ReadAll(io.LimitReader(from, workloads.MaxFile+1))
	if err != nil {
		return nil, usagef("%s: %w", path, err)
	}
	specs, err := workloads.Parse(path, raw, namespace)
	if err != nil {
		return nil, usagef("%w", err)
	}
	return specs, nil
}

func newWorkloadScaleCommand(g *globals) *cobra.Command {
	var shards uint32
	var cpus float64
	var memory string
	var dryRun, yes bool
	cmd := &cobra.Command{
		Use:   "scale NAME [--shards N] [--cpus C] [--memory M]",
		Short: "Change the number of a workload's shards, or the limits of each, in place",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &v1.ChangeWorkloadRequest{Kind: "scale", Name: args[0]}
			flags := cmd.Flags()
			if flags.Changed("shards") {
				req.Shards = &shards
			}
			if flags.Changed("cpus") {
				req.Cpus = &cpus
			}
			if flags.Changed("memory") {
				n, err := parseSize(memory)
				if err != nil {
					return usagef("--memory: %w", err)
				}
				req.MemoryBytes = &n
			}
			if req.Shards == nil && req.Cpus == nil && req.MemoryBytes == nil {
				return usagef("nothing to scale: give --shards, --cpus or --memory")
			}
			c, err := g.changing(cmd, dryRun, yes)
			if err != nil {
				return err
			}
			defer c.client.Close()
			return c.report(c.change(cmd.Context(), req))
		},
	}
	flags := cmd.Flags()
	flags.Uint32Var(&shards, "shards", 0, "how many shards")
	flags.Float64Var(&cpus, "cpus", 0, "CPU limit of each, like 1.5; 0 is none")
	flags.StringVar(&memory, "memory", "", "memory limit of each, like 512m; 0 is none")
	flags.BoolVar(&dryRun, "dry-run", false, "show the difference, and do nothing")
	flags.BoolVarP(&yes, "yes", "y", false, "do not ask, on a terminal")
	return cmd
}

func newWorkloadRmCommand(g *globals) *cobra.Command {
	var dryRun, yes bool
	cmd := &cobra.Command{
		Use:   "rm NAME",
		Short: "Stop and remove a workload and all its shards",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.changing(cmd, dryRun, yes)
			if err != nil {
				return err
			}
			defer c.client.Close()
			return c.report(c.change(cmd.Context(), &v1.ChangeWorkloadRequest{Kind: "remove", Name: args[0]}))
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "show what would go, and do nothing")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask, on a terminal")
	return cmd
}

// change makes one:
//
//  1. a dry run shows the difference; without one, or when it is refused, that is all
//  2. on a terminal the user is asked
//  3. the same again, for what was shown alone
func (c *changing) change(ctx context.Context, req *v1.ChangeWorkloadRequest) error {
	req.DryRun, req.Planned = true, c.planned
	plan, res, _, err := c.follow(ctx, req)
	if err != nil {
		return err
	}
	c.show(plan)
	if c.dryRun {
		c.planned = append(c.planned, &v1.PlannedShards{SpecJson: req.GetSpecJson(), Node: added(plan)})
	}
	if c.dryRun || res.GetOutcome() != "planned" {
		return c.settle(plan, res, 0)
	}
	if ok, err := c.agreed(plan); err != nil || !ok {
		return errors.Join(err, c.settle(plan, &v1.WorkloadResult{Outcome: "cancelled", Reason: "nothing was done"}, 0))
	}
	req.DryRun, req.Expect, req.Prefer = false, plan.GetFingerprint(), added(plan)
	plan, res, done, err := c.follow(ctx, req)
	if ctx.Err() != nil && res == nil {
		res, err = &v1.WorkloadResult{Outcome: "cancelled", Reason: "what was begun is ended or undone; the same command goes on from there"}, nil
	}
	if err != nil {
		return err
	}
	return c.settle(plan, res, done)
}

// added are the hosts of the shards that a plan adds, by shard.
func added(plan *v1.WorkloadPlan) map[string]string {
	out := map[string]string{}
	for _, s := range plan.GetSteps() {
		if s.GetOp() == workloads.Add {
			out[s.GetShard()] = s.GetNode()
		}
	}
	return out
}

func (c *changing) follow(ctx context.Context, req *v1.ChangeWorkloadRequest) (plan *v1.WorkloadPlan, res *v1.WorkloadResult, done uint32, err error) {
	stream, err := c.client.Workloads.Change(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, nil, 0, err
	}
	defer stream.Close()
	for stream.Receive() {
		e := stream.Msg()
		if e.GetPlan() != nil {
			plan = e.GetPlan()
		}
		if e.GetNote() != "" {
			done = e.GetDone()
			fmt.Fprintf(c.cmd.ErrOrStderr(), "[%d/%d] %s\n", e.GetDone(), e.GetAll(), e.GetNote())
		}
		if e.GetResult() != nil {
			res = e.GetResult()
		}
	}
	if res == nil {
		err = stream.Err()
		if err == nil {
			err = errors.New("the daemon ended the answer without a result; the same command goes on from there")
		}
	}
	return plan, res, done, err
}

// show prints the difference. With JSON it goes to stderr, beside progress.
func (c *changing) show(plan *v1.WorkloadPlan) {
	w := c.cmd.OutOrStdout()
	if c.g.output == outputJSON {
		w = c.cmd.ErrOrStderr()
	}
	for _, s := range plan.GetSteps() {
		fmt.Fprintln(w, workloads.Step{Op: s.GetOp(), Shard: s.GetShard(), Node: s.GetNode(), Detail: s.GetDetail()})
	}
	for _, r := range plan.GetRefused() {
		fmt.Fprintln(c.cmd.ErrOrStderr(), "refused: "+r)
	}
}

func (c *changing) agreed(plan *v1.WorkloadPlan) (bool, error) {
	if c.yes || len(plan.GetSteps()) == 0 || !term.IsTerminal(int(c.in.Fd())) {
		return true, nil
	}
	fmt.Fprintf(c.cmd.ErrOrStderr(), "%s: do this? [y/N] ", plan.GetWorkload())
	line, err := bufio.NewReader(c.in).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	answer := strings.ToLower(strings.TrimSpace(line))
	return answer == "y" || answer == "yes", nil
}

// settle keeps the end of one change and turns it into an exit code.
func (c *changing) settle(plan *v1.WorkloadPlan, res *v1.WorkloadResult, done uint32) error {
	c.doc.Workloads = append(c.doc.Workloads, control.WorkloadChangeOf(plan, res, done))
	name := plan.GetWorkload()
	switch res.GetOutcome() {
	case "done", "planned":
		if c.g.output != outputJSON && len(plan.GetSteps()) == 0 {
			fmt.Fprintf(c.cmd.OutOrStdout(), "%s: written down; no shard has to change\n", name)
		}
		return nil
	case "nothing":
		if c.g.output != outputJSON {
			fmt.Fprintf(c.cmd.OutOrStdout(), "%s: nothing to do\n", name)
		}
		return nil
	case "refused":
		if slices.Contains(plan.GetRefused(), res.GetReason()) { // shown already
			return &exitError{code: exitRefused, err: fmt.Errorf("workload %s: refused, and nothing was done", name)}
		}
		return &exitError{code: exitRefused, err: fmt.Errorf("workload %s: %s", name, res.GetReason())}
	case "cancelled":
		if errors.Is(c.cmd.Context().Err(), context.DeadlineExceeded) {
			return &exitError{code: exitDeadline, err: fmt.Errorf("workload %s: not done within --timeout; %s", name, res.GetReason())}
		}
		return &exitError{code: exitCancelled, err: fmt.Errorf("workload %s: cancelled; %s", name, res.GetReason())}
	}
	return &exitError{code: exitFailed, err: fmt.Errorf("workload %s: %s", name, res.GetReason())}
}

// report prints the document, whatever the end.
func (c *changing) report(err error) error {
	if c.g.output == outputJSON {
		return errors.Join(err, printJSON(c.cmd.OutOrStdout(), c.doc))
	}
	return err
}

func newWorkloadLsCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "ls [NAME]",
		Short: "Show workloads, or the shards of one",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			req := &v1.ListWorkloadsRequest{}
			if len(args) > 0 {
				req.Name = args[0]
			}
			resp, err := client.Workloads.ListWorkloads(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			doc := control.WorkloadsDocument{
				Document: control.NewDocument(), Workloads: []control.Workload{}, UnreachableNodes: append([]string{}, resp.Msg.GetUnreachableNodes()...),
			}
			for _, w := range resp.Msg.GetWorkloads() {
				doc.Workloads = append(doc.Workloads, control.WorkloadOf(w))
			}
			if len(args) > 0 && len(doc.Workloads) == 0 {
				return fmt.Errorf("no workload %s; tranship workload ls lists them", args[0])
			}
			for _, node := range doc.UnreachableNodes {
				fmt.Fprintf(cmd.ErrOrStderr(), "%s does not answer: what runs there is not shown\n", node)
			}
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), doc)
			}
			if len(args) > 0 {
				return printWorkloadShards(cmd.OutOrStdout(), doc.Workloads)
			}
			return printWorkloads(cmd.OutOrStdout(), doc.Workloads)
		},
	}
}

func printWorkloads(w io.Writer, list []control.Workload) error {
	var rows [][]string
	for _, x := range list {
		on := map[string]int{}
		for _, s := range x.Shards {
			on[s.Node]++
		}
		var hosts []string
		for _, node := range slices.Sorted(maps.Keys(on)) {
			hosts = append(hosts, fmt.Sprintf("%s:%d", node, on[node]))
		}
		running := fmt.Sprintf("%d/%d", x.Running, x.Wanted)
		if x.Joined > 0 {
			running += fmt.Sprintf(" +%d", x.Joined)
		}
		rows = append(rows, []string{x.Name, x.Namespace, orDash(x.Tenant), fmt.Sprint(x.Priority), running, strings.Join(hosts, " "), orDash(x.Autopilot), orDash(x.Owner)})
	}
	return printTable(w, []string{"NAME", "NAMESPACE", "TENANT", "PRIORITY", "RUNNING", "HOSTS", "AUTOPILOT", "OWNER"}, rows)
}

func printWorkloadShards(w io.Writer, list []control.Workload) error {
	var rows [][]string
	for _, x := range list {
		for _, s := range x.Shards {
			index := s.Labels["tranship.io/index"]
			if index == "" {
				index = "joined"
			}
			limit, cpus := "-", "-"
			if s.MemoryLimitBytes > 0 {
				limit = formatSize(s.MemoryLimitBytes)
			}
			if s.CPUs > 0 {
				cpus = fmt.Sprintf("%g", s.CPUs)
			}
			rows = append(rows, []string{s.Name, index, s.Node, s.Status, orDash(s.IP), cpus, formatSize(s.MemoryUsedBytes), limit})
		}
	}
	return printTable(w, []string{"SHARD", "INDEX", "HOST", "STATUS", "ADDRESS", "CPUS", "MEMORY", "LIMIT"}, rows)
}
