package wire

import "encoding/binary"

// Welcome answers a hello.
type Welcome struct {
	Version uint64
	// Resumed says that the receiver knows this session from an earlier attempt
	// and still has every page of its acknowledged rounds.
	Resumed bool
	// Code says why the connection is refused, "" that it is not.
	Code string
	Text string
}

func (w Welcome) body() int {
	return uvarintLen(w.Version) + 1 + stringLen(w.Code) + stringLen(w.Text)
}

// Len is the length of the whole frame.
func (w Welcome) Len() int { return frameLen(w.body()) }

// Append appends the whole frame.
func (w Welcome) Append(b []byte) []byte {
	b = AppendHeader(b, TypeWelcome, w.body())
	b = binary.AppendUvarint(b, w.Version)
	resumed := byte(0)
	if w.Resumed {
		resumed = 1
	}
	b = append(b, resumed)
	b = appendString(b, w.Code)
	return appendString(b, w.Text)
}

// ParseWelcome parses a welcome's body. Unlike a hello's, its other fields are
// read whatever the version is: they may say why it was refused.
func ParseWelcome(body []byte) (Welcome, error) {
	r := reader{b: body}
	var w Welcome
	w.Version = r.uvarint(1 << 62)
	resumed := r.byte()
	if resumed > 1 {
		r.fail(ErrMalformed)
	}
	w.Resumed = resumed == 1
	w.Code = r.string(MaxCode)
	w.Text = r.string(MaxText)
	if err := r.end(TypeWelcome); err != nil {
		return Welcome{}, err
	}
	return w, nil
}
