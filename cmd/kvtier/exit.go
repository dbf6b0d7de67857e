package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Exit codes, as the help has them.
const (
	exitOK = iota
	exitFinding
	exitUsage
	exitUnreachable
	exitNotFound
	exitServer
)

// failure is an error with the exit code it ends the program with. An empty message prints nothing:
// the verb has said all on its output.
type failure struct {
	code    int
	message string
}

func (f *failure) Error() string { return f.message }

func failf(code int, format string, args ...any) error {
	return &failure{code, fmt.Sprintf(format, args...)}
}

// verbError marks an error as coming from a verb's work, not from its command line.
type verbError struct{ error }

func (e *verbError) Unwrap() error { return e.error }

// dialError is why the daemon's address could not be connected to.
type dialError struct {
	addr string
	err  error
}

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// explainError turns any error into an exit code and a sentence that says what to do.
func (a *app) explainError(err error) *failure {
	if f, ok := errors.AsType[*failure](err); ok {
		return f
	}
	verb, ok := errors.AsType[*verbError](err)
	if !ok {
		return &failure{exitUsage, err.Error() + " (see 'kvtier --help')"}
	}
	// A status that is still wrapped would show its message with gRPC's own prefix.
	err = verb.error
	if e, ok := errors.AsType[*dialError](err); ok {
		return &failure{exitUnreachable, dialMessage(e)}
	}
	if errors.Is(err, context.Canceled) {
		return &failure{exitServer, "interrupted"}
	}
	if st, ok := status.FromError(err); ok {
		return a.explainStatus(st)
	}
	return &failure{exitServer, err.Error()}
}

func dialMessage(e *dialError) string {
	switch {
	case errors.Is(e.err, fs.ErrPermission):
		return fmt.Sprintf("no permission to connect to %s: run as the user who runs kvtierd", e.addr)
	case errors.Is(e.err, fs.ErrNotExist), errors.Is(e.err, syscall.ECONNREFUSED):
		return fmt.Sprintf("no daemon at %s: start one with 'kvtierd', or name another with --addr or KVTIER_ADDR", e.addr)
	}
	return fmt.Sprintf("cannot connect to %s: %v", e.addr, e.err)
}

func (a *app) explainStatus(st *status.Status) *failure {
	message := st.Message() + detailText(st)
	switch st.Code() {
	case codes.NotFound:
		return &failure{exitNotFound, message + ": 'kvtier ls' lists the sequences"}
	case codes.DataLoss:
		return &failure{exitFinding, "stored bytes are damaged: " + message + ": 'kvtier verify' finds all damage"}
	case codes.InvalidArgument, codes.OutOfRange:
		return &failure{exitUsage, message}
	case codes.Unavailable:
		return &failure{exitUnreachable, "the daemon at " + a.addr + " does not answer: " + message}
	case codes.DeadlineExceeded:
		return &failure{exitServer, fmt.Sprintf("no answer from %s within %v: raise --timeout, or see the daemon's log (it may be recovering)", a.addr, a.timeout)}
	case codes.Canceled:
		return &failure{exitServer, "interrupted"}
	case codes.Unimplemented:
		return &failure{exitServer, "the daemon does not know this call: " + message + ": compare 'kvtier version' with 'kvtier status'"}
	}
	return &failure{exitServer, fmt.Sprintf("the daemon failed: %v: %s", st.Code(), message)}
}

// detailText writes the parts of a status's details that help people.
func detailText(st *status.Status) string {
	var b strings.Builder
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			fmt.Fprintf(&b, " (%s)", d.GetReason())
		case *errdetails.RetryInfo:
			fmt.Fprintf(&b, "; try again in %v", d.GetRetryDelay().AsDuration().Round(time.Millisecond))
		}
	}
	return b.String()
}
