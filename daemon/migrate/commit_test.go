package migrate

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/tranship/tranship/transfer"
)

func TestOutcomeOf(t *testing.T) {
	with := func(cause error) context.Context {
		ctx, cancel := context.WithCancelCause(context.Background())
		if cause != nil {
			cancel(cause)
		}
		t.Cleanup(func() { cancel(nil) })
		return ctx
	}
	broken := errors.New("broken")
	tests := []struct {
		name          string
		cause         error
		state         State
		err           error
		outcome, code string
	}{
		{"success", nil, Done, nil, OutcomeDone, ""},
		{"a failure before the yield", nil, Stopping, broken, OutcomeAborted, CodeFailed},
		{"pre-flight refuses", nil, Preparing, &errRefused{}, OutcomeAborted, CodeRefused},
		{"a limit of the blackout cannot be kept", nil, Preparing, fmt.Errorf("pre-copy: %w", &overLimitError{}), OutcomeAborted, CodeOverLimit},
		{"the operator cancels", errCancelled, Preparing, context.Canceled, OutcomeAborted, CodeCancelled},
		{"the deadline passes", errDeadline, Stopping, context.DeadlineExceeded, OutcomeAborted, CodeDeadline},
		{"the daemon stops", errShutdown, Preparing, context.Canceled, OutcomeAborted, CodeRestarted},
		{"the link is cut", nil, Preparing, fmt.Errorf("round 2: %w", transfer.ErrLinkLost), OutcomeAborted, CodeLink},
		{"the destination refuses to run it", nil, Yielded, &refusedToRunError{broken}, OutcomeAborted, CodeRestore},
		{"the destination is silent after the yield", nil, Yielded, errInDoubt, OutcomeInDoubt, CodeInDoubt},
		{"any other error after the yield", nil, Yielded, broken, OutcomeInDoubt, CodeInDoubt},
		{"a cancellation after the yield", errCancelled, Yielded, context.Canceled, OutcomeInDoubt, CodeInDoubt},
		{"it runs there, but something is left here", nil, Yielded, &leftoverError{broken}, OutcomeDone, ""},
		{"the daemon stops while the destination fetches pages", errShutdown, Serving, context.Canceled, OutcomeRunning, CodeRestarted},
		{"the destination loses it before it has every page", nil, Serving, &pagesLostError{}, OutcomeInDoubt, CodePagesLost},
		{"an operator takes it back while the destination fetches pages", nil, Aborted, errTakenBack, OutcomeAborted, CodeRestore},
		{"the deadline passes after post-copy", errDeadline, Done, nil, OutcomeDone, ""},
		{"the journal could not say yielded, and the destination does not answer", nil, Stopping, errInDoubt, OutcomeInDoubt, CodeInDoubt},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			outcome, code := outcomeOf(with(tt.cause), tt.state, tt.err)
			if outcome != tt.outcome || code != tt.code {
				t.Errorf("got %s %q, want %s %q", outcome, code, tt.outcome, tt.code)
			}
		})
	}
}
