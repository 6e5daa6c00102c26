package redischeck

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
)

func parse(s string) (Reply, error) { return ReadReply(bufio.NewReader(strings.NewReader(s))) }

func TestReplies(t *testing.T) {
	for _, c := range []struct {
		name, in string
		want     Reply
		err      error
	}{
		{"a status", "+OK\r\n", Reply{Kind: '+', Text: []byte("OK")}, nil},
		{"an integer", ":-42\r\n", Reply{Kind: ':', Int: -42}, nil},
		{"a value", "$5\r\nab\r\nc\r\n", Reply{Kind: '$', Text: []byte("ab\r\nc")}, nil},
		{"an empty value", "$0\r\n\r\n", Reply{Kind: '$', Text: []byte{}}, nil},
		{"no value", "$-1\r\n", Reply{Kind: '_'}, nil},
		{"a list", "*2\r\n:1\r\n$1\r\nx\r\n", Reply{Kind: '*', Items: []Reply{{Kind: ':', Int: 1}, {Kind: '$', Text: []byte("x")}}}, nil},
		{"an error of the server", "-ERR no\r\n", Reply{}, ServerError("ERR no")},
		{"a value that is longer than it says", "$1\r\nxx\r\n", Reply{}, ErrProtocol},
		{"a length that is no number", "$x\r\n", Reply{}, ErrProtocol},
		{"a length beyond the limit", "$99999999999\r\n", Reply{}, ErrProtocol},
		{"a negative length", "$-2\r\n", Reply{}, ErrProtocol},
		{"a list within a list", "*1\r\n*1\r\n:1\r\n", Reply{}, ErrProtocol},
		{"a list beyond the limit", "*99999999\r\n", Reply{}, ErrProtocol},
		{"a line without its end", "+OK\n", Reply{}, ErrProtocol},
		{"something else", "HTTP/1.1 400\r\n", Reply{}, ErrProtocol},
		{"an empty line", "\r\n", Reply{}, ErrProtocol},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parse(c.in)
			if !errors.Is(err, c.err) || err == nil && !reflect.DeepEqual(got, c.want) {
				t.Errorf("%q: %+v, %v", c.in, got, err)
			}
		})
	}
}

func TestAReplyThatIsCutAnywhereIsAnError(t *testing.T) {
	const whole = "*3\r\n$5\r\nhello\r\n:7\r\n+fine\r\n"
	if _, err := parse(whole); err != nil {
		t.Fatal(err)
	}
	for n := range len(whole) {
		if got, err := parse(whole[:n]); !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, ErrProtocol) {
			t.Errorf("after %d bytes: %+v, %v", n, got, err)
		}
	}
}

// A request is itself a list of values, so it can be read back as a reply.
func TestRequestsRoundTrip(t *testing.T) {
	args := [][]byte{[]byte("SET"), []byte("key"), {0, '\r', '\n', 255}, {}}
	got, err := parse(string(AppendRequest(nil, args...)))
	if err != nil || len(got.Items) != len(args) {
		t.Fatalf("%+v, %v", got, err)
	}
	for i, a := range args {
		if !bytes.Equal(got.Items[i].Text, a) {
			t.Errorf("argument %d: %q", i, got.Items[i].Text)
		}
	}
}

func FuzzReadReply(f *testing.F) {
	for _, s := range []string{"+OK\r\n", "-ERR\r\n", ":1\r\n", "$3\r\nabc\r\n", "*1\r\n$-1\r\n", "$99999999\r\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		reply, err := ReadReply(bufio.NewReader(bytes.NewReader(raw)))
		if err == nil && len(reply.Text) > len(raw) {
			t.Errorf("%d bytes from %d", len(reply.Text), len(raw))
		}
	})
}

func TestWhatAKeyHoldsTellsItsDamage(t *testing.T) {
	d := plan(1<<20, 7)
	if d.Bytes < 1<<20 || d.Bytes > 1<<20+16<<10 {
		t.Errorf("%d bytes were planned", d.Bytes)
	}
	good := d.append(nil, 3, 5)
	if len(good) != d.size(3) {
		t.Fatalf("%d bytes instead of %d", len(good), d.size(3))
	}
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1
	for _, c := range []struct {
		name  string
		value []byte
		want  string
	}{
		{"the right one", good, ""},
		{"an older generation", d.append(nil, 3, 4), "holds generation 4, but 5 was acknowledged"},
		{"another key's", d.append(nil, 4, 5), "not its own value"},
		{"a flipped bit at the end", flipped, "different from byte"},
		{"a value that is cut", good[:len(good)-1], "bytes instead of"},
		{"nothing", nil, "not its own value"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := d.compare(3, 5, c.value, nil)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}
