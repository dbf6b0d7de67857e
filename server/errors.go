package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"kvtier/tiers"
)

// Reasons that errors carry, beside their code: stable, for programs.
const (
	ReasonShape       = "SHAPE_MISMATCH"     // a tensor or list has the wrong size
	ReasonValue       = "VALUE_NOT_FINITE"   // NaN or infinity
	ReasonLossy       = "CONVERSION_LOSSY"   // rows do not fit the sequence's element type
	ReasonSpec        = "BAD_MODEL_SPEC"     // out of range
	ReasonSpecDiffers = "MODEL_SPEC_DIFFERS" // not the sequence's
	ReasonArgument    = "BAD_ARGUMENT"
	ReasonUnknown     = "UNKNOWN_ID"
	ReasonPrefixGone  = "PREFIX_GONE"     // the sequence does not begin any more with what was matched
	ReasonExists      = "POSITION_EXISTS" // other bytes are there
	ReasonSealed      = "POSITION_SEALED"
	ReasonGap         = "GAP"
	ReasonPastEnd     = "PAST_END"
	ReasonForkPoint   = "FORK_POINT"
	ReasonTailFull    = "TAIL_MEMORY_FULL"
	ReasonDiskFull    = "DISK_FULL"
	ReasonCorrupt     = "STORED_BYTES_CORRUPT"
	ReasonRegion      = "BAD_REGION"
	ReasonFrame       = "BAD_FRAME"
	ReasonClosing     = "SHUTTING_DOWN"
	ReasonTimeout     = "DEADLINE"
	ReasonCancelled   = "CANCELLED"
	ReasonInternal    = "INTERNAL"
)

// domain of ErrorInfo details.
const errorDomain = "kvtier"

// Error is an error with a code, a reason, and a message that says what to do.
type Error struct {
	Code    codes.Code
	Reason  string
	Message string
	Retry   time.Duration // for RESOURCE_EXHAUSTED
	cause   error
}

func (e *Error) Error() string { return e.Reason + ": " + e.Message }

// Unwrap returns what caused it.
func (e *Error) Unwrap() error { return e.cause }

// GRPCStatus makes gRPC send the code and its details.
func (e *Error) GRPCStatus() *status.Status {
	st := status.New(e.Code, e.Message)
	out, err := st.WithDetails(&errdetails.ErrorInfo{Reason: e.Reason, Domain: errorDomain})
	if err != nil {
		return st
	}
	if e.Code == codes.ResourceExhausted {
		if r, err := out.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(e.Retry)}); err == nil {
			out = r
		}
	}
	return out
}

func fail(c codes.Code, reason, format string, a ...any) *Error {
	return &Error{Code: c, Reason: reason, Message: fmt.Sprintf(format, a...)}
}

func invalid(reason, format string, a ...any) *Error {
	return fail(codes.InvalidArgument, reason, format, a...)
}

// toError puts any error into the protocol's words: the one table from
// sentinels to codes.
func toError(err error) *Error {
	var e *Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &e):
		return e
	case errors.Is(err, tiers.ErrCorrupt):
		e = fail(codes.DataLoss, ReasonCorrupt, "stored bytes are damaged, nothing was answered from them: %v; run 'kvtier verify', delete the sequence and append it again", err)
	case errors.Is(err, tiers.ErrFull):
		e = fail(codes.ResourceExhausted, ReasonDiskFull, "no room on disk: %v; delete sequences or raise --disk", err)
		e.Retry = time.Second
	case errors.Is(err, tiers.ErrNotFound):
		e = fail(codes.NotFound, ReasonUnknown, "%v", err)
	case errors.Is(err, tiers.ErrVersion):
		e = fail(codes.FailedPrecondition, ReasonCorrupt, "%v", err)
	case errors.Is(err, tiers.ErrClosed):
		e = fail(codes.Unavailable, ReasonClosing, "the daemon is shutting down")
	case errors.Is(err, context.DeadlineExceeded):
		e = fail(codes.DeadlineExceeded, ReasonTimeout, "the call's deadline passed")
	case errors.Is(err, context.Canceled):
		e = fail(codes.Canceled, ReasonCancelled, "the call was cancelled")
	default:
		e = fail(codes.Internal, ReasonInternal, "%v", err)
	}
	e.cause = err
	return e
}
