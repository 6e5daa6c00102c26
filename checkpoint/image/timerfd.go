package image

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/encoding/protowire"
)

// Field numbers of images/fdinfo.proto and images/timerfd.proto.
const (
	timerfdType = 17 // fd_types

	fileEntryTimer = 12
	timerTicks     = 5
	timerVSec      = 7
	timerVNsec     = 8
	timerISec      = 9
	timerINsec     = 10
)

// RearmTimers copies a files.img from r to w and sets every periodic timerfd
// that had expired, unread, when it was dumped to expire again after one
// interval. The kernel tells such a timer as not armed (it_value 0, ticks above
// 0), and CRIU up to 4.2.1 restores what it was told, so the timer would never
// fire again (CRIU issue 3162). It returns how many timers it set.
func RearmTimers(w io.Writer, r io.Reader) (int, error) {
	img, err := openImage(bufio.NewReader(r), filesMagic)
	if err != nil {
		return 0, fmt.Errorf("files: %w", err)
	}
	buffered := bufio.NewWriter(w)
	out, err := newImage(buffered, filesMagic)
	if err != nil {
		return 0, fmt.Errorf("write files: %w", err)
	}
	rearmed := 0
	for {
		raw, err := img.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, fmt.Errorf("files: %w", err)
		}
		entry, changed, err := rearmEntry(raw)
		if err != nil {
			return 0, fmt.Errorf("files: %w", err)
		}
		if changed {
			rearmed++
		}
		if err := out.entry(entry); err != nil {
			return 0, fmt.Errorf("write files: %w", err)
		}
	}
	if err := buffered.Flush(); err != nil {
		return 0, fmt.Errorf("write files: %w", err)
	}
	return rearmed, nil
}

// rearmEntry gives a file entry back, changed if it is such a timer.
func rearmEntry(raw []byte) (entry []byte, changed bool, err error) {
	timer, err := fileOf(raw, timerfdType, fileEntryTimer)
	if timer == nil || err != nil {
		return raw, false, err
	}
	var ticks, vsec, vnsec, isec, insec uint64
	err = fields(timer, func(f field) error {
		switch f.num {
		case timerTicks:
			ticks = f.value
		case timerVSec:
			vsec = f.value
		case timerVNsec:
			vnsec = f.value
		case timerISec:
			isec = f.value
		case timerINsec:
			insec = f.value
		}
		return nil
	}, timerTicks, timerVSec, timerVNsec, timerISec, timerINsec)
	if err != nil {
		return nil, false, err
	}
	if ticks == 0 || vsec != 0 || vnsec != 0 || isec == 0 && insec == 0 {
		return raw, false, nil
	}
	armed, err := replace(timer, map[protowire.Number]uint64{timerVSec: isec, timerVNsec: insec})
	if err != nil {
		return nil, false, err
	}
	entry, err = replaceBytes(raw, fileEntryTimer, armed)
	return entry, true, err
}

// replace copies a message with other values for some of its numbers.
func replace(msg []byte, values map[protowire.Number]uint64) ([]byte, error) {
	return rewrite(msg, func(b []byte, num protowire.Number, whole []byte) []byte {
		if v, ok := values[num]; ok {
			return appendVarint(b, num, v)
		}
		return append(b, whole...)
	})
}

// replaceBytes copies a message with another content for one embedded message.
func replaceBytes(msg []byte, which protowire.Number, content []byte) ([]byte, error) {
	return rewrite(msg, func(b []byte, num protowire.Number, whole []byte) []byte {
		if num == which {
			return protowire.AppendBytes(protowire.AppendTag(b, num, protowire.BytesType), content)
		}
		return append(b, whole...)
	})
}

func rewrite(msg []byte, put func(b []byte, num protowire.Number, whole []byte) []byte) ([]byte, error) {
	out := make([]byte, 0, len(msg)+16)
	for len(msg) > 0 {
		num, _, n := protowire.ConsumeField(msg)
		if n < 0 {
			return nil, malformed("%v", protowire.ParseError(n))
		}
		out = put(out, num, msg[:n])
		msg = msg[n:]
	}
	return out, nil
}
