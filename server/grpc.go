package server

import (
	"context"
	"errors"
	"io"
	"math"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
)

// maxMessage bounds a gRPC message, both ways.
const maxMessage = 256 << 20

// GRPCOptions are the options that a gRPC server for Register needs: message
// sizes, and errors in the protocol's words.
func GRPCOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.InitialWindowSize(16 << 20), grpc.InitialConnWindowSize(32 << 20),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (resp any, err error) {
			defer recovered(&err)
			if resp, err = h(ctx, req); err != nil {
				return nil, wire(err)
			}
			return resp, nil
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) (err error) {
			defer recovered(&err)
			return wire(h(srv, ss))
		}),
	}
}

// recovered turns a panic, which would be a defect, into an error of one call.
func recovered(err *error) {
	if r := recover(); r != nil {
		*err = fail(codes.Internal, ReasonInternal, "this is a defect in kvtier: %v", r)
	}
}

// wire returns err as gRPC sends it.
func wire(err error) error {
	if err == nil {
		return nil
	}
	return toError(err).GRPCStatus().Err()
}

// Register offers both services.
func (srv *Server) Register(g *grpc.Server) {
	kvtierv1.RegisterSequenceServiceServer(g, &sequenceService{srv: srv})
	kvtierv1.RegisterInspectionServiceServer(g, &inspectionService{srv: srv})
}

// sequenceService is the gRPC front end for workers.
type sequenceService struct {
	kvtierv1.UnimplementedSequenceServiceServer
	srv *Server
}

func (x *sequenceService) CreateLease(_ context.Context, r *kvtierv1.CreateLeaseRequest) (*kvtierv1.CreateLeaseResponse, error) {
	ttl := time.Duration(r.TtlSeconds) * time.Second
	if ttl == 0 {
		ttl = defaultLease
	}
	if ttl > maxLease {
		return nil, invalid(ReasonArgument, "a lease lives at most %d seconds without renewal", int(maxLease.Seconds()))
	}
	return &kvtierv1.CreateLeaseResponse{LeaseId: x.srv.leases.create(ttl, r.Holder), TtlSeconds: uint32(ttl.Seconds())}, nil
}

func (x *sequenceService) RenewLease(_ context.Context, r *kvtierv1.RenewLeaseRequest) (*kvtierv1.RenewLeaseResponse, error) {
	ttl, err := x.srv.leases.renew(r.LeaseId)
	return &kvtierv1.RenewLeaseResponse{TtlSeconds: uint32(ttl.Seconds())}, err
}

func (x *sequenceService) RevokeLease(_ context.Context, r *kvtierv1.RevokeLeaseRequest) (*kvtierv1.RevokeLeaseResponse, error) {
	return &kvtierv1.RevokeLeaseResponse{}, x.srv.leases.revoke(r.LeaseId)
}

func (x *sequenceService) OpenSequence(ctx context.Context, r *kvtierv1.OpenSequenceRequest) (*kvtierv1.OpenSequenceResponse, error) {
	leave, err := x.srv.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	if r.LeaseId != 0 {
		if _, err := x.srv.leases.renew(r.LeaseId); err != nil {
			return nil, err
		}
	}
	s, release, err := x.srv.open(ctx, r)
	if err != nil {
		return nil, err
	}
	if r.LeaseId != 0 {
		if _, err := x.srv.leases.attach(r.LeaseId, release); err != nil {
			release()
			return nil, err
		}
	} else {
		s.holdUntilClose(release)
	}
	return x.opened(s), nil
}

func (x *sequenceService) opened(s *sequence) *kvtierv1.OpenSequenceResponse {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return &kvtierv1.OpenSequenceResponse{SequenceId: s.id, Ack: s.ackLocked(), Spec: s.spec.msg, Profile: kvtierv1.Profile(s.profile),
		Name: s.name, ExactUntil: min(s.mu.exactUntil, s.mu.accepted), Handle: s.handle}
}

func (x *sequenceService) MatchPrefix(_ context.Context, r *kvtierv1.MatchPrefixRequest) (*kvtierv1.MatchPrefixResponse, error) {
	p, s, err := x.srv.matchPrefix(r)
	if err != nil || s == nil {
		return &kvtierv1.MatchPrefixResponse{}, err
	}
	return &kvtierv1.MatchPrefixResponse{Matched: p.Tokens, SequenceId: s.id, Prefix: p}, nil
}

func (x *sequenceService) Append(ctx context.Context, r *kvtierv1.AppendRequest) (*kvtierv1.AppendResponse, error) {
	leave, err := x.srv.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	s, err := x.srv.sequence(r.SequenceId)
	if err != nil {
		return nil, err
	}
	err = s.append(ctx, &appendRequest{layer: int(r.Layer), start: r.Start, k: r.K, v: r.V, typ: compress.ElementType(r.Dtype),
		convert: r.Convert, sparse: r.SparseProvenance, ids: r.TokenIds, texts: r.TokenText, labels: r.Spans, queries: r.Queries})
	if err != nil {
		return nil, err
	}
	return &kvtierv1.AppendResponse{Ack: s.ack()}, nil
}

func (x *sequenceService) Attend(ctx context.Context, r *kvtierv1.AttendRequest) (*kvtierv1.AttendResponse, error) {
	leave, err := x.srv.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	return x.attend(ctx, r)
}

// attend answers all items; with one item its failure is the call's.
func (x *sequenceService) attend(ctx context.Context, r *kvtierv1.AttendRequest) (*kvtierv1.AttendResponse, error) {
	b, err := x.srv.budgetOf(r.Budget)
	if err != nil {
		return nil, err
	}
	items := make([]batchItem, len(r.Items))
	for i, it := range r.Items {
		items[i].seq, items[i].err = x.srv.sequence(it.SequenceId)
		items[i].query = queryOf(r, it, b)
	}
	if err := x.srv.attendMany(ctx, items); err != nil {
		return nil, err
	}
	out := &kvtierv1.AttendResponse{}
	for i := range items {
		if err := items[i].err; err != nil {
			if len(items) == 1 {
				return nil, err
			}
			e := toError(err)
			out.Results = append(out.Results, &kvtierv1.AttendResult{ErrorCode: uint32(e.Code), ErrorMessage: e.Error()})
			continue
		}
		a := items[i].answer
		out.Results = append(out.Results, &kvtierv1.AttendResult{Output: floatBytes(a.out), Lse: floatBytes(a.lse), Account: a.account, Ack: a.ack})
	}
	return out, nil
}

func queryOf(r *kvtierv1.AttendRequest, it *kvtierv1.AttendItem, b budget) *query {
	q := &query{layer: int(min(r.Layer, math.MaxInt32)), start: it.Start, q: it.Q, typ: compress.ElementType(r.Dtype), budget: b}
	if len(it.K) > 0 || len(it.V) > 0 {
		q.append = &appendRequest{k: it.K, v: it.V, typ: compress.ElementType(r.Dtype), ids: it.TokenIds, texts: it.TokenText}
	}
	if len(it.PartialOutput) > 0 || len(it.PartialLse) > 0 {
		q.partial = &workerPartial{it.PartialOutput, it.PartialLse}
	}
	return q
}

func floatBytes(x []float32) []byte {
	b := make([]byte, 4*len(x))
	compress.FromFloat32(b, x, compress.F32)
	return b
}

// batchItem is one sequence's query of a frame that carries several.
type batchItem struct {
	seq    *sequence
	query  *query
	answer *answer
	err    error
}

// attendMany answers the items of one frame at the same time; each succeeds or
// fails for itself. A sequence may occur once.
func (srv *Server) attendMany(ctx context.Context, items []batchItem) error {
	if len(items) == 0 {
		return invalid(ReasonShape, "an Attend needs at least one item")
	}
	seen := map[*sequence]bool{}
	for _, it := range items {
		if it.seq != nil && seen[it.seq] {
			return invalid(ReasonArgument, "sequence %s occurs twice in one Attend", it.seq.id)
		}
		seen[it.seq] = true
	}
	if len(items) == 1 {
		items[0].run(ctx)
		return nil
	}
	var g errgroup.Group
	g.SetLimit(srv.opt.Cores)
	for i := range items {
		g.Go(func() error {
			items[i].run(ctx)
			return nil
		})
	}
	return g.Wait()
}

func (b *batchItem) run(ctx context.Context) {
	defer recovered(&b.err)
	if b.err == nil {
		b.answer, b.err = b.seq.attend(ctx, b.query)
	}
}

func (x *sequenceService) AttendStream(st kvtierv1.SequenceService_AttendStreamServer) error {
	for {
		r, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		out, err := x.streamed(st.Context(), r.GetRequest())
		if err != nil {
			return err
		}
		if err := st.Send(out); err != nil {
			return err
		}
	}
}

// streamed answers one request of a stream; a failure of its own is in the answer, an error ends the stream.
func (x *sequenceService) streamed(ctx context.Context, r *kvtierv1.AttendRequest) (*kvtierv1.AttendStreamResponse, error) {
	leave, err := x.srv.enter()
	if err != nil {
		return nil, err
	}
	defer leave() // after a panic, too: Close waits for it
	out := &kvtierv1.AttendStreamResponse{}
	if r == nil {
		err = invalid(ReasonArgument, "a message of an AttendStream has no request: give one")
	} else {
		out.Response, err = x.attend(ctx, r)
	}
	if err != nil {
		e := toError(err)
		out.ErrorCode, out.ErrorMessage = uint32(e.Code), e.Error()
	}
	return out, nil
}

// begin finds the sequence that a call is about; the call is in flight until leave.
func (x *sequenceService) begin(id string) (s *sequence, leave func(), err error) {
	if leave, err = x.srv.enter(); err != nil {
		return nil, nil, err
	}
	if s, err = x.srv.sequence(id); err != nil {
		leave()
		return nil, nil, err
	}
	return s, leave, nil
}

func (x *sequenceService) Prefetch(_ context.Context, r *kvtierv1.PrefetchRequest) (*kvtierv1.PrefetchResponse, error) {
	s, leave, err := x.begin(r.SequenceId)
	if err != nil {
		return nil, err
	}
	defer leave()
	var bytes int64
	st := s.snapshot()
	for _, l := range r.Layers {
		if int(l) >= s.spec.layers {
			return nil, invalid(ReasonShape, "layer %d: the model has %d", l, s.spec.layers)
		}
		for _, ref := range st.spans {
			bytes += x.srv.store.BringUp(ref.segments[l], tiers.AllPlanes&^tiers.LowPlanes)
		}
	}
	return &kvtierv1.PrefetchResponse{BytesQueued: uint64(bytes)}, nil
}

func (x *sequenceService) ReadKV(ctx context.Context, r *kvtierv1.ReadKVRequest) (*kvtierv1.ReadKVResponse, error) {
	leave, err := x.srv.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	s, err := x.srv.sequence(r.SequenceId)
	if err != nil {
		return nil, err
	}
	k, v, exact, err := s.readKV(ctx, int(min(r.Layer, math.MaxInt32)), r.Start, r.Count)
	if err != nil {
		return nil, err
	}
	return &kvtierv1.ReadKVResponse{K: k, V: v, Dtype: kvtierv1.ElementType(s.spec.typ), Exact: exact}, nil
}

func (x *sequenceService) Truncate(ctx context.Context, r *kvtierv1.TruncateRequest) (*kvtierv1.TruncateResponse, error) {
	s, leave, err := x.begin(r.SequenceId)
	if err != nil {
		return nil, err
	}
	defer leave()
	if err := s.truncate(ctx, r.Length); err != nil {
		return nil, err
	}
	return &kvtierv1.TruncateResponse{Ack: s.ack()}, nil
}

func (x *sequenceService) Flush(ctx context.Context, r *kvtierv1.FlushRequest) (*kvtierv1.FlushResponse, error) {
	s, leave, err := x.begin(r.SequenceId)
	if err != nil {
		return nil, err
	}
	defer leave()
	if err := s.flush(ctx, r.Seal); err != nil {
		return nil, err
	}
	return &kvtierv1.FlushResponse{Ack: s.ack()}, nil
}

func (x *sequenceService) CloseSequence(_ context.Context, r *kvtierv1.CloseSequenceRequest) (*kvtierv1.CloseSequenceResponse, error) {
	s, leave, err := x.begin(r.SequenceId)
	if err != nil {
		return nil, err
	}
	defer leave()
	s.closeOne()
	if err := s.syncLog(); err != nil {
		return nil, err
	}
	return &kvtierv1.CloseSequenceResponse{Ack: s.ack()}, nil
}

func (x *sequenceService) DeleteSequence(ctx context.Context, r *kvtierv1.DeleteSequenceRequest) (*kvtierv1.DeleteSequenceResponse, error) {
	s, leave, err := x.begin(r.SequenceId)
	if err != nil {
		return nil, err
	}
	defer leave()
	if err := s.delete(ctx); err != nil {
		return nil, err
	}
	return &kvtierv1.DeleteSequenceResponse{}, nil
}

func (x *sequenceService) Pin(_ context.Context, r *kvtierv1.PinRequest) (*kvtierv1.PinResponse, error) {
	s, leave, err := x.begin(r.SequenceId)
	if err != nil {
		return nil, err
	}
	defer leave()
	id, bytes, err := x.srv.pin(s, r.LeaseId, r.Start, r.End)
	if err != nil {
		return nil, err
	}
	return &kvtierv1.PinResponse{PinId: id, Bytes: uint64(bytes)}, nil
}

func (x *sequenceService) Unpin(_ context.Context, r *kvtierv1.UnpinRequest) (*kvtierv1.UnpinResponse, error) {
	return &kvtierv1.UnpinResponse{}, x.srv.unpin(r.PinId)
}
