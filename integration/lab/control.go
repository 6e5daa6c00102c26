package lab

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The machine speaks to a host's init over a unix socket in the host's
// directory: one request a connection, four bytes of length and JSON each way.
// A request that runs a program carries its standard input, output and error
// as descriptors; its connection then takes signals and gives the exit.
const (
	opStatus = "status" // what runs
	opEnsure = "ensure" // run this service; again, if it runs with other settings
	opStart  = "start"  // run a killed service again
	opKill   = "kill"   // kill a service and keep it down
	opExec   = "exec"   // run a program and stay with it
)

// maxMessage bounds a message: an environment and arguments, 2 MiB in Linux.
const maxMessage = 4 << 20

type request struct {
	Op      string   `json:"op"`
	Service *service `json:"service,omitempty"`
	Name    string   `json:"name,omitempty"`
	Signal  int      `json:"signal,omitempty"`
	Args    []string `json:"args,omitempty"`
	Env     []string `json:"env,omitempty"`
	Dir     string   `json:"dir,omitempty"`
}

// service is a program that init keeps running.
type service struct {
	Name string   `json:"name"`
	Args []string `json:"args"`
	// Config is the content of its configuration: another content means that
	// it has to be started again.
	Config string `json:"config"`
}

type reply struct {
	Error    string         `json:"error,omitempty"`
	Services []serviceState `json:"services,omitempty"`
	// PID is of an executed program, in the host's own pid namespace.
	PID  int   `json:"pid,omitempty"`
	Exit *exit `json:"exit,omitempty"`
}

// exit is how a program ended: by code, or by signal when that is not 0.
type exit struct {
	Code   int `json:"code"`
	Signal int `json:"signal"`
}

// serviceState is a service as its init knows it.
type serviceState struct {
	Name string `json:"name"`
	// PID is in the host's own pid namespace; 0 while it is down.
	PID int `json:"pid"`
	// Starts counts; a service that starts again and again has a reason in its log.
	Starts int `json:"starts"`
	// Held says that it was killed on purpose and stays down.
	Held bool `json:"held"`
}

func socketPath(dir string) string { return filepath.Join(dir, "init.sock") }

// call sends one request to a node's init and returns the answer.
func call(ctx context.Context, node string, req request) (reply, error) {
	conn, err := dialInit(ctx, node)
	if err != nil {
		return reply{}, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	var ans reply
	err = writeMessage(conn, req)
	if err == nil {
		err = readMessage(conn, &ans)
	}
	switch {
	case ctx.Err() != nil:
		return reply{}, context.Cause(ctx)
	case err != nil:
		return reply{}, fmt.Errorf("asking the init of %s: %w", node, err)
	case ans.Error != "":
		return reply{}, fmt.Errorf("init of %s: %s", node, ans.Error)
	}
	return ans, nil
}

func dialInit(ctx context.Context, node string) (*net.UnixConn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socketPath(nodeDir(node)))
	if err != nil {
		return nil, fmt.Errorf("%s does not answer (`tranship lab up` starts it again): %w", node, err)
	}
	return conn.(*net.UnixConn), nil
}

func writeMessage(w io.Writer, msg any) error {
	raw, err := encodeMessage(msg)
	if err != nil {
		return err
	}
	_, err = w.Write(raw)
	return err
}

func encodeMessage(msg any) ([]byte, error) {
	raw, err := json.Marshal(msg)
	if err != nil {
		return nil, err
	}
	if len(raw) > maxMessage {
		return nil, fmt.Errorf("a message of %d bytes: at most %d", len(raw), maxMessage)
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(raw))), raw...), nil
}

func readMessage(r io.Reader, into any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > maxMessage {
		return fmt.Errorf("a message of %d bytes: at most %d", size, maxMessage)
	}
	raw := make([]byte, size)
	if _, err := io.ReadFull(r, raw); err != nil {
		return err
	}
	return json.Unmarshal(raw, into)
}

// writeWithFiles sends a message whose first byte carries descriptors.
func writeWithFiles(conn *net.UnixConn, msg any, fds ...int) error {
	raw, err := encodeMessage(msg)
	if err != nil {
		return err
	}
	n, _, err := conn.WriteMsgUnix(raw[:1], unix.UnixRights(fds...), nil)
	if err != nil || n != 1 {
		return errors.Join(err, io.ErrShortWrite)
	}
	_, err = conn.Write(raw[1:])
	return err
}

// readWithFiles reads a message and the descriptors that came with it, which
// are the caller's to close, also on error.
func readWithFiles(conn *net.UnixConn, into any) (fds []int, err error) {
	var first [1]byte
	oob := make([]byte, unix.CmsgSpace(3*4))
	n, oobn, _, _, err := conn.ReadMsgUnix(first[:], oob)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	for _, m := range msgs {
		got, err := unix.ParseUnixRights(&m)
		if err != nil {
			return fds, err
		}
		fds = append(fds, got...)
	}
	return fds, readMessage(io.MultiReader(&oneByte{b: first[0]}, conn), into)
}

// oneByte gives back the byte that was read with the descriptors.
type oneByte struct {
	b    byte
	done bool
}

func (o *oneByte) Read(p []byte) (int, error) {
	if o.done || len(p) == 0 {
		return 0, io.EOF
	}
	p[0], o.done = o.b, true
	return 1, nil
}
