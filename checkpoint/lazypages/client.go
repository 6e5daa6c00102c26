package lazypages

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
)

// ErrRefused says that the server lives and does not do what was asked.
var ErrRefused = errors.New("page server refused")

// ErrServerGone says that the server's process ended without a last word. Look
// tells whether another can take over; if nobody can and CRIU had handed over
// tasks, their missing pages are zeros: they must be stopped.
var ErrServerGone = errors.New("page server is gone")

// FailedError is a server's own report that it has failed.
type FailedError struct{ Status Status }

func (e *FailedError) Error() string { return "page server: " + e.Status.Error }

// Client talks to a server's control socket, or reads the last word of a server
// that has ended. Its methods may be called concurrently; each makes a
// connection of its own.
type Client struct{ path string }

// At is the client of the server with the control socket path, which may be dead, or
// not yet there.
func At(path string) *Client { return &Client{path: path} }

// Status asks how far the server is.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var st Status
	err := c.ask(ctx, opStatus, func(a answer) (bool, error) {
		st = a.Status
		return true, nil
	})
	return st, err
}

// WaitFinished returns when CRIU has finished the restore and the shard runs. A
// *FailedError or ErrServerGone says that it never will.
func (c *Client) WaitFinished(ctx context.Context) (Status, error) {
	return c.wait(ctx, State.finished)
}

// WaitDone returns when every page is placed.
func (c *Client) WaitDone(ctx context.Context) (Status, error) {
	return c.wait(ctx, func(s State) bool { return s == StateDone })
}

func (c *Client) wait(ctx context.Context, enough func(State) bool) (Status, error) {
	var st Status
	err := c.ask(ctx, opWatch, func(a answer) (bool, error) {
		st = a.Status
		switch {
		case enough(st.State):
			return true, nil
		case st.State == StateFailed:
			return true, &FailedError{st}
		}
		return false, nil
	})
	return st, err
}

// ask sends a request and gives the answers to use until it has enough. The
// server writes its last status before it stops answering.
func (c *Client) ask(ctx context.Context, op string, use func(answer) (enough bool, err error)) error {
	err := c.converse(ctx, op, use)
	if !errors.Is(err, ErrServerGone) {
		return err
	}
	last, lastErr := ReadStatus(c.path)
	switch {
	case errors.Is(lastErr, os.ErrNotExist):
		return err
	case lastErr != nil:
		return errors.Join(err, lastErr)
	}
	enough, err := use(answer{Status: last})
	if !enough && err == nil {
		err = fmt.Errorf("page server ended as %s: %w", last.State, ErrServerGone)
	}
	return err
}

func (c *Client) converse(ctx context.Context, op string, use func(answer) (enough bool, err error)) error {
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(unixEpoch) })()
	err = func() error {
		raw, err := json.Marshal(request{op})
		if err != nil {
			return err
		}
		if _, err := conn.Write(append(raw, '\n')); err != nil {
			return fmt.Errorf("%w: %w", ErrServerGone, err)
		}
		in := bufio.NewReader(conn)
		for {
			line, err := in.ReadBytes('\n')
			if err != nil {
				if errors.Is(err, io.EOF) {
					err = io.ErrUnexpectedEOF
				}
				return fmt.Errorf("%w: %w", ErrServerGone, err)
			}
			var a answer
			if err := json.Unmarshal(line, &a); err != nil {
				return err
			}
			if a.Refused != "" {
				return fmt.Errorf("%w: %s", ErrRefused, a.Refused)
			}
			if enough, err := use(a); enough || err != nil {
				return err
			}
		}
	}()
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("%s at %s: %w", op, c.path, err)
	}
	return nil
}

func (c *Client) connect(ctx context.Context) (net.Conn, error) {
	var conn net.Conn
	err := withShortPath(c.path, func(short string) (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, "unix", short)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w: %w", c.path, ErrServerGone, err)
	}
	return conn, nil
}
