// Package transfer carries a shard's memory and files from one host to another
// and is the only door to QUIC. One UDP socket a host serves the control API
// (HTTP/3) and page sessions; both ends of every connection show a certificate
// of the cluster. It refuses to call anything sent that the receiver has not
// acknowledged as applied, to let two rounds overlap, and to take a cut stream
// for an end.
//
// Flow of a page: Round.Pages drops what the peer already has and what is zero,
// copies the rest, or what changed in it, into a batch; a lane encodes the batch,
// paces it and writes it to its stream; the receiver checks, decodes and hands it to the Sink;
// Round.Close returns when every lane has been answered with equal counts.
package transfer

import (
	"context"
	"io"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer/wire"
)

// ProtocolVersion is compared by pre-flight: two hosts must have the same.
const ProtocolVersion = wire.Version

// What a connection is for is agreed on in the TLS handshake.
const (
	alpnPages = "tranship/1"
	alpnAPI   = http3.NextProtoH3
)

// AcceptFunc says where the pages and blobs of a migration go. It is called for
// each session that a peer opens, and again whenever the peer reconnects; when
// it is called, no call of an earlier connection is running in the Sink it may
// have answered before. Answering the same Sink (compared with ==, so a
// pointer) says that it still has everything that was acknowledged; another
// Sink makes the sender start over. An error refuses the peer; a *RemoteError
// travels as it is. ctx ends with the connection.
type AcceptFunc func(ctx context.Context, peer, migration string) (Sink, error)

// Sink takes what arrives for one migration. Its methods are called by several
// goroutines at once and must come back: a server does not close before they
// have. An error goes back to the sender, a *RemoteError as it is.
type Sink interface {
	// PutPages keeps data, whole pages that begin at addr, in place of what was
	// there. data is valid only during the call.
	PutPages(pid checkpoint.PID, addr uint64, data []byte) error
	// ReadPages fills dst, whole pages, with what is kept at addr: zeros where
	// nothing was put. It is asked for pages that were acknowledged.
	ReadPages(pid checkpoint.PID, addr uint64, dst []byte) error
	// ZeroPages makes n pages at addr read as zero. n may span an address space.
	ZeroPages(pid checkpoint.PID, addr uint64, n checkpoint.Pages) error
	// Blob reads r to its end. size is -1 when the sender does not know it. kind
	// and name come from the peer as they are. r answers io.EOF only when the
	// blob arrived whole; after any other error nothing of it may be used.
	Blob(ctx context.Context, kind, name string, size int64, r io.Reader) error
}

const (
	// streamWindow lets a stream be that far ahead of the Sink: at 10 Gbit/s the
	// 64 MiB of a round's four cover a round trip of 50 ms. A connection carries one
	// of them, and blobs, which must not stop it when their Sink does. connWindow is
	// also the most that a peer can make this host hold in a connection.
	streamWindow = 16 << 20
	connWindow   = 2 * streamWindow
	// A quarter from the start: the window grows only with round trips, and the
	// last round, the one that the shard stands still for, is short.
	initialStreamWindow = streamWindow / 4
	initialConnWindow   = connWindow / 4

	// maxStreams bounds the streams that a peer may have open in a connection,
	// each with a goroutine and half a megabyte of buffers here.
	maxStreams = 64
	// maxUniStreams: HTTP/3 has three (control and two of QPACK), pages none.
	maxUniStreams = 8
	// maxPeerConns bounds the connections of one peer.
	maxPeerConns = 128
	// maxPeerSessions bounds the migrations that one peer may have on their way here.
	maxPeerSessions = 256

	// DefaultIdleTimeout is when a link over which nothing comes is lost, and
	// DefaultKeepAlive makes something come: three may get lost.
	DefaultIdleTimeout = 6 * time.Second
	DefaultKeepAlive   = 1500 * time.Millisecond
	// handshakeTimeout is for one round trip of a handshake, helloTimeout for the
	// frame after it.
	handshakeTimeout = 5 * time.Second
	helloTimeout     = 10 * time.Second
	// drainTimeout is how long a reconnecting sender waits for the calls of its
	// earlier connection to return from the Sink.
	drainTimeout = 10 * time.Second
	// sessionRetention is how long a receiver remembers a session whose link is
	// lost. It remembers a few hundred bytes, and keeps the Sink alive.
	sessionRetention = 5 * time.Minute
)

// Error codes of closed connections and reset streams.
const (
	codeDone       quic.ApplicationErrorCode = 0 // nothing is missing
	codeGoingAway  quic.ApplicationErrorCode = 1 // the daemon stops
	codeProtocol   quic.ApplicationErrorCode = 2 // the peer broke the protocol
	codeSuperseded quic.ApplicationErrorCode = 3 // a later attempt took the session over
	codeRefused    quic.ApplicationErrorCode = 4
	codeIncomplete quic.ApplicationErrorCode = 5 // closed by the sender with work undone

	streamAborted quic.StreamErrorCode = 1 // cancelled, or of no further use
)

func quicConfig(idle, keepAlive time.Duration) *quic.Config {
	return &quic.Config{
		Versions:                       []quic.Version{quic.SupportedVersions()[0]},
		HandshakeIdleTimeout:           handshakeTimeout,
		MaxIdleTimeout:                 idle,
		KeepAlivePeriod:                keepAlive,
		InitialStreamReceiveWindow:     initialStreamWindow,
		MaxStreamReceiveWindow:         streamWindow,
		InitialConnectionReceiveWindow: initialConnWindow,
		MaxConnectionReceiveWindow:     connWindow,
		MaxIncomingStreams:             maxStreams,
		MaxIncomingUniStreams:          maxUniStreams,
	}
}
