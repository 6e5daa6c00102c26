package lazypages

import (
	"bufio"
	"encoding/json"
	"errors"
	"net"
	"sync"
	"time"
)

// The control protocol is lines of JSON: a request, then one answer, or for
// opWatch one at once and one whenever the state has changed, up to a final one.
// After opPull the connection is a puller's (pull.go).
type request struct {
	Op string `json:"op"`
}

type answer struct {
	Status Status `json:"status"`
	// Refused says why a request was not granted.
	Refused string `json:"refused,omitempty"`
}

const (
	opStatus = "status"
	opWatch  = "watch"
)

const (
	// maxClients bounds the connections; one daemon needs two or three.
	maxClients = 16
	// maxRequest bounds one line.
	maxRequest = 4 << 10
	// farewell is how long a client may take to accept an answer. The server's
	// work does not wait for its clients, only its end does, for this long.
	farewell = time.Second
)

// serveControl answers clients until the listener is closed, and then lets those
// that wait have the last status.
func (s *server) serveControl(l *net.UnixListener) {
	slots := make(chan struct{}, maxClients)
	var clients sync.WaitGroup
	defer clients.Wait()
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				s.cfg.Log.Error("control socket", "err", err)
			}
			return
		}
		select {
		case slots <- struct{}{}:
		default:
			_ = conn.Close() // full: the client sees the end of the stream
			continue
		}
		clients.Add(1)
		go func() {
			defer func() { <-slots; clients.Done() }()
			s.serveClient(conn)
		}()
	}
}

// serveClient answers one client until it leaves or nothing more can change.
func (s *server) serveClient(conn *net.UnixConn) {
	defer conn.Close()
	// An idle client must not keep a server that has ended.
	over := make(chan struct{})
	var idle sync.WaitGroup
	idle.Add(1)
	defer idle.Wait()
	defer close(over)
	go func() {
		defer idle.Done()
		s.untilFinal(over)
		_ = conn.SetReadDeadline(time.Now().Add(farewell / 10))
	}()
	in := bufio.NewScanner(conn)
	in.Buffer(make([]byte, 0, 512), maxRequest)
	for in.Scan() {
		var req request
		if err := json.Unmarshal(in.Bytes(), &req); err != nil {
			s.tell(conn, answer{Refused: "not a request: " + err.Error()})
			return
		}
		switch req.Op {
		case opStatus:
			st, _ := s.snapshot()
			if !s.tell(conn, answer{Status: st}) {
				return
			}
		case opWatch:
			s.watch(conn)
			return
		case opPull:
			if st, _ := s.snapshot(); s.tell(conn, answer{Status: st}) {
				s.pull(conn)
			}
			return
		default:
			s.tell(conn, answer{Refused: "unknown request " + req.Op})
			return
		}
	}
}

// untilFinal returns when the server has ended, or over is closed.
func (s *server) untilFinal(over <-chan struct{}) {
	for {
		st, changed := s.snapshot()
		if st.State.Final() {
			return
		}
		select {
		case <-changed:
		case <-over:
			return
		}
	}
}

// watch tells every state. States that pass while one is being told are left out.
func (s *server) watch(conn *net.UnixConn) {
	gone := make(chan struct{})
	var reader sync.WaitGroup
	reader.Add(1)
	go func() { // a client that watches says no more, but may leave
		defer reader.Done()
		defer close(gone)
		_, _ = conn.Read(make([]byte, 1))
	}()
	defer reader.Wait()
	defer conn.Close()
	for {
		st, changed := s.snapshot()
		if !s.tell(conn, answer{Status: st}) || st.State.Final() {
			return
		}
		select {
		case <-changed:
		case <-gone:
			// The deadline that ends idle clients ends this read, too.
			if st, _ := s.snapshot(); st.State.Final() {
				s.tell(conn, answer{Status: st})
			}
			return
		}
	}
}

func (s *server) tell(conn *net.UnixConn, a answer) bool {
	raw, err := json.Marshal(a)
	if err != nil {
		s.cfg.Log.Error("control socket", "err", err)
		return false
	}
	return s.write(conn, raw)
}

func (s *server) write(conn *net.UnixConn, line []byte) bool {
	_ = conn.SetWriteDeadline(time.Now().Add(farewell))
	_, err := conn.Write(append(line, '\n'))
	return err == nil
}
