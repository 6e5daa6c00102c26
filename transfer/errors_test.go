package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/quic-go/quic-go"
)

func TestErrorsOfQUICAreSorted(t *testing.T) {
	tests := []struct {
		name string
		err  error
		is   error
		code string
	}{
		{"nothing heard", &quic.IdleTimeoutError{}, ErrLinkLost, ""},
		{"no handshake", &quic.HandshakeTimeoutError{}, ErrLinkLost, ""},
		{"the peer was restarted", &quic.StatelessResetError{}, ErrLinkLost, ""},
		{"the socket broke", &net.OpError{Op: "write", Err: errors.New("no route")}, ErrLinkLost, ""},
		{"the peer's transport broke", &quic.TransportError{Remote: true, ErrorCode: quic.InternalError}, ErrLinkLost, ""},
		{"a certificate was not accepted", &quic.TransportError{ErrorCode: cryptoErrors + 42}, ErrUntrusted, ""},
		{"the peer speaks neither protocol", &quic.TransportError{ErrorCode: cryptoErrors + alertNoProtocol}, nil, ""},
		{"the peer stops", &quic.ApplicationError{Remote: true, ErrorCode: codeGoingAway}, ErrLinkLost, ""},
		{"the peer objects", &quic.ApplicationError{Remote: true, ErrorCode: codeProtocol, ErrorMessage: "x"}, nil, CodeProtocol},
		{"another session took over", &quic.ApplicationError{Remote: true, ErrorCode: codeSuperseded, ErrorMessage: "x"}, nil, CodeSuperseded},
		{"this end closed", &quic.ApplicationError{ErrorCode: codeDone}, ErrClosed, ""},
		{"the peer reset a stream", &quic.StreamError{Remote: true}, nil, CodeCut},
		{"the caller's end", fmt.Errorf("x: %w", context.Canceled), context.Canceled, ""},
		{"wrapped", fmt.Errorf("x: %w", &quic.IdleTimeoutError{}), ErrLinkLost, ""},
		{"sorted already", fmt.Errorf("x: %w", ErrUntrusted), ErrUntrusted, ""},
		{"something else", io.ErrShortWrite, io.ErrShortWrite, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got := linkError(test.err)
			for _, sentinel := range []error{ErrLinkLost, ErrUntrusted, ErrClosed} {
				if errors.Is(got, sentinel) != errors.Is(test.is, sentinel) {
					t.Errorf("%v is %v: %v", got, sentinel, errors.Is(got, sentinel))
				}
			}
			if test.is != nil && !errors.Is(got, test.is) {
				t.Errorf("%v is not %v", got, test.is)
			}
			var remote *RemoteError
			if errors.As(got, &remote) != (test.code != "") || remote != nil && remote.Code != test.code {
				t.Errorf("%v, want code %q", got, test.code)
			}
		})
	}
	if linkError(nil) != nil {
		t.Error("no error became one")
	}
}

func TestAnErrorOfAnyLengthCanBeTold(t *testing.T) {
	code, text := asRemote(&RemoteError{Code: strings.Repeat("c", 1000), Text: strings.Repeat("\xff", 100_000)}, CodeSink)
	if len(code) != 64 || len(text) > 1024 || text == "" {
		t.Errorf("%d and %d bytes", len(code), len(text))
	}
}
