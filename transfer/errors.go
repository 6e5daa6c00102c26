package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/quic-go/quic-go"

	"github.com/tranship/tranship/transfer/encoding"
	"github.com/tranship/tranship/transfer/wire"
)

var (
	// ErrLinkLost says that the peer can no longer be heard, or stopped: whether
	// it applied what was not acknowledged is unknown. Session.Redial may help.
	ErrLinkLost = errors.New("link lost")
	// ErrUntrusted says that one end did not accept the other's certificate.
	ErrUntrusted = errors.New("not trusted")
	// ErrForgotten says that the receiver no longer has what it acknowledged in
	// this session. Every page must be sent again, in a new session.
	ErrForgotten = errors.New("the receiver no longer knows this session")
	// ErrClosed says that this end closed the session.
	ErrClosed = errors.New("session closed")
)

// Codes of a RemoteError that this package makes; a Sink or an AcceptFunc may
// answer others.
const (
	CodeRefused    = "refused"    // the AcceptFunc said no
	CodeVersion    = "version"    // another version of the protocol
	CodeBusy       = "busy"       // over a limit, or an earlier connection does not end
	CodeSuperseded = "superseded" // a later connection took the session over
	CodeProtocol   = "protocol"   // one end does not follow the protocol
	CodeSink       = "sink"       // the Sink could not take it
	CodeCorrupt    = "corrupt"    // it did not arrive as it was sent
	CodeCut        = "cut"        // it ended before its end
)

// RemoteError is what the receiver answered: a refusal, not a lost link.
type RemoteError struct {
	// Code is stable and for programs.
	Code string
	// Text is for people and names the thing.
	Text string
}

func (e *RemoteError) Error() string { return fmt.Sprintf("peer: %s (%s)", e.Text, e.Code) }

// asRemote makes the code and text that go to the peer of an error.
func asRemote(err error, code string) (string, string) {
	text := err.Error()
	var remote *RemoteError
	if errors.As(err, &remote) && remote.Code != "" {
		code, text = remote.Code, remote.Text
	}
	return wire.Clip(code, wire.MaxCode), wire.Clip(text, 1024)
}

// cryptoErrors is where QUIC puts TLS alerts (RFC 9001, section 4.8).
const (
	cryptoErrors      = 0x100
	alertNoProtocol   = 120
	lastCryptoAlertNo = 0xff
)

// linkError sorts an error of QUIC into those that callers tell apart.
func linkError(err error) error {
	var (
		app       *quic.ApplicationError
		transport *quic.TransportError
		stream    *quic.StreamError
		idle      *quic.IdleTimeoutError
		handshake *quic.HandshakeTimeoutError
		reset     *quic.StatelessResetError
		network   *net.OpError
	)
	switch {
	case err == nil, errors.Is(err, ErrLinkLost), errors.Is(err, ErrUntrusted), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.As(err, &app):
		if !app.Remote {
			return fmt.Errorf("%w: %w", ErrClosed, err)
		}
		switch app.ErrorCode {
		case codeProtocol:
			return &RemoteError{Code: CodeProtocol, Text: app.ErrorMessage}
		case codeSuperseded:
			return &RemoteError{Code: CodeSuperseded, Text: app.ErrorMessage}
		case codeRefused:
			return &RemoteError{Code: CodeRefused, Text: app.ErrorMessage}
		}
		return fmt.Errorf("%w: %w", ErrLinkLost, err)
	case errors.As(err, &idle), errors.As(err, &handshake), errors.As(err, &reset):
		return fmt.Errorf("%w: %w", ErrLinkLost, err)
	case errors.As(err, &transport):
		if alert := int64(transport.ErrorCode) - cryptoErrors; alert >= 0 && alert <= lastCryptoAlertNo && alert != alertNoProtocol {
			return fmt.Errorf("%w: %w", ErrUntrusted, err)
		} else if alert == alertNoProtocol {
			return err
		}
		return fmt.Errorf("%w: %w", ErrLinkLost, err)
	case errors.As(err, &stream):
		if stream.Remote {
			return &RemoteError{Code: CodeCut, Text: fmt.Sprintf("the peer reset stream %d (%d)", stream.StreamID, stream.ErrorCode)}
		}
		return err
	case errors.As(err, &network), errors.Is(err, net.ErrClosed):
		return fmt.Errorf("%w: %w", ErrLinkLost, err)
	}
	return err
}

// violation says whether an error of reading a stream means that the peer does
// not follow the protocol, rather than that the stream or the link broke.
func violation(err error) bool {
	return errors.Is(err, wire.ErrMalformed) || errors.Is(err, wire.ErrLimit) || errors.Is(err, wire.ErrTruncated) || errors.Is(err, encoding.ErrCorrupt)
}

// cut says whether a stream was ended, not reset, in the middle.
func cut(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

// unexpected is err for a reader that was promised more.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
