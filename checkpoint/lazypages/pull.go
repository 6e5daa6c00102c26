package lazypages

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"

	"github.com/tranship/tranship/checkpoint"
)

// In post-copy the store lacks pages that are owed. Whoever knows where they are
// pulls: over a connection of its own it asks what is wanted, fetches that, and
// delivers it, in turn. A connection has at most one answer on its way, and when
// it breaks, what it had not delivered is wanted again.
//
//	want     blocks until something is wanted, or nothing ever will be
//	deliver  a line, then the pages; answered when the store has them

// MaxPull is how many pages one want may ask for, and one deliver bring.
const MaxPull checkpoint.Pages = 256

// pullRequest is a line from a puller; pages follow a delivery.
type pullRequest struct {
	Op string `json:"op"`
	// Urgent asks for what a thread waits for, and for nothing else; without it,
	// nothing is asked for before the tasks run.
	Urgent bool             `json:"urgent,omitempty"`
	Limit  checkpoint.Pages `json:"limit,omitempty"`
}

type pullAnswer struct {
	PID checkpoint.PID `json:"pid,omitempty"`
	// Extents are address and number of pages of each run.
	Extents [][2]uint64 `json:"extents,omitempty"`
	// Whole says that nothing is owed any more.
	Whole   bool   `json:"whole,omitempty"`
	Refused string `json:"refused,omitempty"`
}

const (
	opPull    = "pull"
	opWant    = "want"
	opDeliver = "deliver"
)

// delivery is what was pulled, on its way to a family.
type delivery struct {
	spans []span
	data  []byte
	done  chan error // has room for the one answer
}

// inbox hands deliveries to a family's goroutine. Each of the few connections
// has at most one in it.
type inbox struct {
	mu     sync.Mutex
	closed bool
	waits  []*delivery
}

// put returns false when the family has ended: nobody needs the pages.
func (b *inbox) put(d *delivery) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closed {
		b.waits = append(b.waits, d)
	}
	return !b.closed
}

func (b *inbox) take() []*delivery {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := b.waits
	b.waits = nil
	return out
}

func (b *inbox) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for _, d := range b.waits {
		d.done <- nil
	}
	b.waits = nil
}

// takeDeliveries stores what was pulled, as far as it is still owed: what the
// spaces gave up meanwhile was released, and what came twice is here. It is the
// family's goroutine that does it, so that no page is given back while it comes.
func (f *family) takeDeliveries() {
	for _, d := range f.inbox.take() {
		d.done <- f.keepDelivery(d)
	}
}

func (f *family) keepDelivery(d *delivery) error {
	data := d.data
	for _, s := range d.spans {
		first, last := s.start/checkpoint.PageSize, s.end/checkpoint.PageSize
		for from := first; ; {
			start, end, ok := f.owed.next(from, last, last-from)
			if !ok {
				break
			}
			part := data[(start-first)*checkpoint.PageSize : (end-first)*checkpoint.PageSize]
			if err := f.store.Arrive(f.task.PID, start*checkpoint.PageSize, part); err != nil {
				return err
			}
			f.settleOwed(start, end)
			from = end
		}
		data = data[s.end-s.start:]
	}
	return nil
}

// puller is the server's end of a puller's connection.
type puller struct {
	s    *server
	conn *net.UnixConn
	// messages are what it says; left is closed when it has gone, over when it is
	// listened to no more.
	messages   chan pullMessage
	left, over chan struct{}
	// flight is what it was asked to bring, of which family.
	of     *family
	flight []span
}

type pullMessage struct {
	pullRequest
	data []byte
}

// pull serves one puller until it leaves or breaks the protocol.
func (s *server) pull(conn *net.UnixConn) {
	p := &puller{s: s, conn: conn, messages: make(chan pullMessage), left: make(chan struct{}), over: make(chan struct{})}
	var reader sync.WaitGroup
	reader.Go(p.read)
	defer reader.Wait()
	defer conn.Close() // ends the reader
	defer close(p.over)
	defer func() { s.giveBack(p.of, p.flight) }()
	for m := range p.messages {
		ok := false
		switch {
		case m.Op == opWant && p.of == nil && m.Limit > 0 && m.Limit <= MaxPull:
			ok = p.want(m)
		case m.Op == opDeliver && p.of != nil && pagesOf(p.flight).Bytes() == checkpoint.Bytes(len(m.data)):
			ok = p.deliver(m.data)
		default:
			s.say(conn, pullAnswer{Refused: "out of turn: " + m.Op})
		}
		if !ok {
			return
		}
	}
}

// read takes what the puller says, until it leaves.
func (p *puller) read() {
	defer close(p.messages)
	defer close(p.left)
	in := bufio.NewReaderSize(p.conn, maxRequest)
	for {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return
		}
		var m pullMessage
		if err := json.Unmarshal(line, &m.pullRequest); err != nil {
			return
		}
		if m.Op == opDeliver {
			if m.Limit <= 0 || m.Limit > MaxPull {
				return
			}
			m.data = make([]byte, m.Limit.Bytes())
			if _, err := io.ReadFull(in, m.data); err != nil {
				return
			}
		}
		select {
		case p.messages <- m:
		case <-p.over:
			return
		}
	}
}

func (p *puller) want(m pullMessage) bool {
	var a pullAnswer
	p.of, p.flight, a.Whole = p.s.wants(m.Urgent, m.Limit, p.left)
	if p.of == nil && !a.Whole {
		return false
	}
	if p.of != nil {
		a.PID = p.of.task.PID
	}
	for _, e := range p.flight {
		a.Extents = append(a.Extents, [2]uint64{e.start, (e.end - e.start) / checkpoint.PageSize})
	}
	return p.s.say(p.conn, a)
}

// deliver hands pages to their family. If they cannot be stored, the puller's
// flight is given back.
func (p *puller) deliver(data []byte) bool {
	d := &delivery{spans: p.flight, data: data, done: make(chan error, 1)}
	if p.of.inbox.put(d) {
		p.of.wakeUp()
		if err := <-d.done; err != nil {
			p.s.say(p.conn, pullAnswer{Refused: err.Error()})
			return false
		}
	}
	p.of, p.flight = nil, nil
	return p.s.say(p.conn, pullAnswer{})
}

func pagesOf(spans []span) checkpoint.Pages {
	var n checkpoint.Pages
	for _, s := range spans {
		n += checkpoint.Pages((s.end - s.start) / checkpoint.PageSize)
	}
	return n
}

// wants returns what to pull next, or that nothing is owed any more. It blocks
// until then, or until gone is closed.
func (s *server) wants(urgent bool, limit checkpoint.Pages, gone <-chan struct{}) (f *family, what []span, whole bool) {
	for {
		s.mu.Lock()
		families, news := slices.Clone(s.families), s.news
		s.mu.Unlock()
		st, changed := s.snapshot()
		if st.State.Final() {
			return nil, nil, st.State == StateDone
		}
		owed := checkpoint.Pages(0)
		for _, f := range families {
			if urgent {
				if what := f.wanted.take(true, limit); len(what) > 0 {
					return f, what, false
				}
			}
			owed += f.wanted.count()
		}
		if st.Finished && owed == 0 {
			return nil, nil, true
		}
		// Until the tasks run, what they do not wait for can wait, too.
		for i := 0; i < len(families) && !urgent && st.Finished; i++ {
			if what := families[i].wanted.take(false, limit); len(what) > 0 {
				return families[i], what, false
			}
		}
		select {
		case <-news:
		case <-changed:
		case <-gone:
			return nil, nil, false
		}
	}
}

// giveBack makes wanted again what was on its way.
func (s *server) giveBack(f *family, spans []span) {
	if f == nil {
		return
	}
	f.wanted.giveBack(spans)
	f.wakeUp() // it knows which of them a thread waits for
	s.tellHungry()
}

// tellHungry wakes those who wait for something to be wanted.
func (s *server) tellHungry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.news)
	s.news = make(chan struct{})
}

func (s *server) say(conn *net.UnixConn, a pullAnswer) bool {
	raw, err := json.Marshal(a)
	if err != nil {
		s.cfg.Log.Error("control socket", "err", err)
		return false
	}
	return s.write(conn, raw)
}

// Pull is a connection over which one puller works. It is not for concurrent use.
type Pull struct {
	conn net.Conn
	in   *bufio.Reader
}

// Want is what a puller is to fetch: runs of pages of one process.
type Want struct {
	PID     checkpoint.PID
	Extents []checkpoint.Extent
}

// Pages is the number of pages.
func (w Want) Pages() checkpoint.Pages {
	var n checkpoint.Pages
	for _, e := range w.Extents {
		n += e.Pages
	}
	return n
}

// Bytes is its size.
func (w Want) Bytes() checkpoint.Bytes { return w.Pages().Bytes() }

// Pull opens a connection for a puller. What it wanted and did not deliver is
// wanted from others when it is closed. ErrServerGone when there is no server.
func (c *Client) Pull(ctx context.Context) (*Pull, error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	p := &Pull{conn: conn, in: bufio.NewReaderSize(conn, 64<<10)}
	raw, err := json.Marshal(request{opPull})
	if err == nil {
		_, err = conn.Write(append(raw, '\n'))
	}
	if err == nil {
		_, err = p.in.ReadBytes('\n')
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("pull at %s: %w: %w", c.path, ErrServerGone, err), conn.Close())
	}
	return p, nil
}

// Close may be called at any time, by anyone, and ends what blocks.
func (p *Pull) Close() error { return p.conn.Close() }

// Want asks what to fetch next, at most limit pages and at most MaxPull; urgent
// asks for what a thread waits for, and leaves the rest to others. It blocks; whole says that every page has
// arrived or is needed no more.
func (p *Pull) Want(urgent bool, limit checkpoint.Pages) (w Want, whole bool, err error) {
	a, err := p.ask(pullRequest{Op: opWant, Urgent: urgent, Limit: limit}, nil)
	if err != nil {
		return Want{}, false, err
	}
	w.PID = a.PID
	for _, e := range a.Extents {
		w.Extents = append(w.Extents, checkpoint.Extent{PID: a.PID, Addr: e[0], Pages: checkpoint.Pages(e[1])})
	}
	return w, a.Whole, nil
}

// Deliver brings what was wanted last, its extents one after the other.
// ErrRefused, as when the store is full, ends the connection.
func (p *Pull) Deliver(data []byte) error {
	_, err := p.ask(pullRequest{Op: opDeliver, Limit: checkpoint.Pages(len(data) / checkpoint.PageSize)}, data)
	return err
}

func (p *Pull) ask(r pullRequest, data []byte) (pullAnswer, error) {
	raw, err := json.Marshal(r)
	if err != nil {
		return pullAnswer{}, err
	}
	_, err = p.conn.Write(append(append(raw, '\n'), data...))
	// A server that refuses may close before it has read everything, and has said
	// why.
	line, readErr := p.in.ReadBytes('\n')
	if readErr != nil {
		return pullAnswer{}, fmt.Errorf("%s: %w: %w", r.Op, ErrServerGone, errors.Join(err, readErr))
	}
	var a pullAnswer
	if err := json.Unmarshal(line, &a); err != nil {
		return pullAnswer{}, fmt.Errorf("%s: %w", r.Op, err)
	}
	if a.Refused != "" {
		return pullAnswer{}, fmt.Errorf("%s: %w: %s", r.Op, ErrRefused, a.Refused)
	}
	return a, nil
}
