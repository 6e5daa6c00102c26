package redischeck

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"
)

// The part of RESP2 (https://redis.io/docs/reference/protocol-spec) that the
// check needs: requests are arrays of bulk strings, replies are simple strings,
// errors, integers, bulk strings and arrays of those.

// Limits of a reply: a value is at most maxValue, a list is one MGET.
const (
	maxBulk  = 64 << 20
	maxArray = 1 << 16
	maxLine  = 1 << 10
)

// ErrProtocol is a reply that is not RESP, or beyond the limits.
var ErrProtocol = errors.New("not a redis reply")

// ServerError is an error that redis answered.
type ServerError string

func (e ServerError) Error() string { return "redis: " + string(e) }

// Reply is one reply. Of its fields only the one that Kind names is set.
type Reply struct {
	Kind  byte // '+', ':', '$', '*', or '_' for a null
	Text  []byte
	Int   int64
	Items []Reply
}

// AppendRequest appends the request args to dst.
func AppendRequest(dst []byte, args ...[]byte) []byte {
	dst = append(dst, '*')
	dst = strconv.AppendInt(dst, int64(len(args)), 10)
	dst = append(dst, "\r\n"...)
	for _, a := range args {
		dst = append(dst, '$')
		dst = strconv.AppendInt(dst, int64(len(a)), 10)
		dst = append(dst, "\r\n"...)
		dst = append(dst, a...)
		dst = append(dst, "\r\n"...)
	}
	return dst
}

// ReadReply reads one reply. An error that the server answered is returned as
// ServerError, and the connection stays usable; after any other error it is not.
func ReadReply(r *bufio.Reader) (Reply, error) { return readReply(r, 0) }

func readReply(r *bufio.Reader, depth int) (Reply, error) {
	line, err := readLine(r)
	if err != nil {
		return Reply{}, err
	}
	if len(line) == 0 {
		return Reply{}, fmt.Errorf("%w: an empty line", ErrProtocol)
	}
	kind, rest := line[0], line[1:]
	switch kind {
	case '+':
		return Reply{Kind: '+', Text: bytes.Clone(rest)}, nil
	case '-':
		return Reply{}, ServerError(rest)
	case ':':
		n, err := strconv.ParseInt(string(rest), 10, 64)
		if err != nil {
			return Reply{}, fmt.Errorf("%w: integer %q", ErrProtocol, rest)
		}
		return Reply{Kind: ':', Int: n}, nil
	case '$':
		n, err := strconv.Atoi(string(rest))
		if err != nil || n < -1 || n > maxBulk {
			return Reply{}, fmt.Errorf("%w: length %q", ErrProtocol, rest)
		}
		if n == -1 {
			return Reply{Kind: '_'}, nil
		}
		// Read as it comes: a length alone must not make us take that much memory.
		var text bytes.Buffer
		if _, err := io.CopyN(&text, r, int64(n)+2); err != nil {
			return Reply{}, unexpected(err)
		}
		raw := text.Bytes()
		if raw[n] != '\r' || raw[n+1] != '\n' {
			return Reply{}, fmt.Errorf("%w: a value of %d bytes does not end there", ErrProtocol, n)
		}
		return Reply{Kind: '$', Text: raw[:n:n]}, nil
	case '*':
		n, err := strconv.Atoi(string(rest))
		if err != nil || n < -1 || n > maxArray || depth > 0 {
			return Reply{}, fmt.Errorf("%w: array %q", ErrProtocol, rest)
		}
		if n == -1 {
			return Reply{Kind: '_'}, nil
		}
		reply := Reply{Kind: '*'}
		for range n {
			item, err := readReply(r, depth+1)
			if err != nil {
				return Reply{}, err
			}
			reply.Items = append(reply.Items, item)
		}
		return reply, nil
	}
	return Reply{}, fmt.Errorf("%w: it begins with %q", ErrProtocol, kind)
}

func readLine(r *bufio.Reader) ([]byte, error) {
	line, err := r.ReadSlice('\n')
	if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
		return nil, unexpected(err)
	}
	if err != nil || len(line) > maxLine || len(line) < 2 || line[len(line)-2] != '\r' {
		return nil, fmt.Errorf("%w: line %.20q", ErrProtocol, line)
	}
	return line[:len(line)-2], nil
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF // within a reply there is no good end
	}
	return err
}

// conn is one connection. It is not for concurrent use.
type conn struct {
	net.Conn
	in      *bufio.Reader
	out     []byte
	timeout time.Duration
	pending int
}

func dial(ctx context.Context, addr string, timeout time.Duration) (*conn, error) {
	var d net.Dialer
	d.Timeout = timeout
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return &conn{Conn: c, in: bufio.NewReaderSize(c, 64<<10), timeout: timeout}, nil
}

// queue adds a request that flush sends; one reply is to be read for each.
func (c *conn) queue(args ...[]byte) {
	c.out = AppendRequest(c.out, args...)
	c.pending++
}

func (c *conn) flush() error {
	if err := c.SetDeadline(time.Now().Add(c.timeout)); err != nil {
		return err
	}
	_, err := c.Write(c.out)
	c.out = c.out[:0]
	return err
}

func (c *conn) reply() (Reply, error) {
	c.pending--
	return ReadReply(c.in)
}

// do sends one request and reads its reply.
func (c *conn) do(args ...[]byte) (Reply, error) {
	c.queue(args...)
	if err := c.flush(); err != nil {
		return Reply{}, err
	}
	return c.reply()
}
