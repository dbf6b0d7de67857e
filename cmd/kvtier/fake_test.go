package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// fakeDaemon answers with fixed replies over a real Unix socket.
type fakeDaemon struct {
	kvtierv1.UnimplementedInspectionServiceServer
	kvtierv1.UnimplementedSequenceServiceServer

	addr   string
	health *health.Server
	status *kvtierv1.GetStatusResponse
	list   []*kvtierv1.SequenceInfo
	verify []*kvtierv1.VerifyResponse
	// err, if set, is what Explain, Flush and Verify answer.
	err error

	mu struct {
		sync.Mutex
		deleted []string
		flushed []*kvtierv1.FlushRequest
		checked []string
	}
}

const (
	idBook  = "01jd9q2v7m8k3n5r6t4w0x1y2z"
	idFork  = "01jd9q2v9acdefghjkmnpqrstv"
	idVideo = "01jdb0000000000000000000zz"
)

func startFake(t *testing.T) *fakeDaemon {
	t.Helper()
	dir := shortTempDir(t)
	f := &fakeDaemon{
		addr:   "unix://" + filepath.Join(dir, "kvtier.sock"),
		health: health.NewServer(),
		status: fixedStatus(),
		list:   fixedList(),
		verify: fixedVerify(),
	}
	l, err := net.Listen("unix", filepath.Join(dir, "kvtier.sock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "kvtier.sock"), 0o600); err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	kvtierv1.RegisterInspectionServiceServer(g, f)
	kvtierv1.RegisterSequenceServiceServer(g, f)
	grpc_health_v1.RegisterHealthServer(g, f.health)
	for _, s := range services {
		f.health.SetServingStatus(s, grpc_health_v1.HealthCheckResponse_SERVING)
	}
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	return f
}

// shortTempDir is t.TempDir with a short name: a socket's path has at most 107 bytes.
func shortTempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func fixedStatus() *kvtierv1.GetStatusResponse {
	return &kvtierv1.GetStatusResponse{
		Version: "v0.1.0", DataDir: "/var/lib/kvtier", UptimeSeconds: 93784,
		Tiers: []*kvtierv1.TierStatus{
			{Name: "ram", BytesUsed: 900 << 20, BytesLimit: 1 << 30, Pieces: 14400, Hits: 91234, Misses: 8766, BytesRead: 61 << 30, BytesWritten: 3 << 30, Evictions: 31007},
			{Name: "nvme", BytesUsed: 7 << 30, BytesLimit: 20 << 30, Pieces: 115200, Hits: 8766, BytesRead: 5 << 30, BytesWritten: 7 << 30},
		},
		Sequences: 3, SequencesOpen: 1, Leases: 1, TailBytes: 288 << 20, TailBytesLimit: 2 << 30,
		Attends: 1234567, Appends: 40960, Audits: 12345, AuditErrorMean: 0.0123, AuditErrorP95: 0.0312, AuditCoverage: 0.953,
		RssBytes: 1543503872, SealsPending: 32,
		GpuAudits: &kvtierv1.GPUAudits{Compared: 2048, LargestError: 2.6e-4, LargestLseError: 1.9e-5},
		Gpu:       &kvtierv1.GPUStatus{SegmentsSealed: 4320, SegmentsKept: 4288, PinnedBytes: 896 << 20, SegmentsAhead: 960, SegmentsAheadUsed: 911},
	}
}

func fixedList() []*kvtierv1.SequenceInfo {
	return []*kvtierv1.SequenceInfo{
		{
			SequenceId: idBook, Name: "moby-dick", Profile: kvtierv1.Profile_PROFILE_BALANCED, Open: true,
			Ack:         &kvtierv1.Ack{Accepted: 131072, CrashSafe: 131072, PowerSafe: 131008, Sealed: 129024},
			SealedBytes: 2906 << 20, CreatedUnix: 1_780_000_000, UsedUnix: 1_780_090_000,
		},
		{
			SequenceId: idFork, Name: "", Profile: kvtierv1.Profile_PROFILE_BALANCED, ParentId: idBook,
			Ack:         &kvtierv1.Ack{Accepted: 4100, CrashSafe: 4100, PowerSafe: 4100, Sealed: 4096},
			SealedBytes: 92 << 20, CreatedUnix: 1_780_080_000, UsedUnix: 1_780_089_940,
		},
		{
			SequenceId: idVideo, Name: "talk\x1b[31m.mp4", Profile: kvtierv1.Profile_PROFILE_EXACT,
			Ack:         &kvtierv1.Ack{Accepted: 20000, CrashSafe: 20000, PowerSafe: 20000, Sealed: 18432},
			SealedBytes: 612 << 20, CreatedUnix: 1_779_000_000, UsedUnix: 1_779_900_000,
			Damage: "span 2048-4096, layer 3: checksum of plane k2 at extent 7, offset 8192",
		},
	}
}

func fixedVerify() []*kvtierv1.VerifyResponse {
	return []*kvtierv1.VerifyResponse{
		{BytesDone: 1 << 30, BytesTotal: 4 << 30, SegmentsDone: 100},
		{BytesDone: 4 << 30, BytesTotal: 4 << 30, SegmentsDone: 400, Finished: true},
	}
}

func (f *fakeDaemon) GetStatus(context.Context, *kvtierv1.GetStatusRequest) (*kvtierv1.GetStatusResponse, error) {
	return f.status, nil
}

func (f *fakeDaemon) ListSequences(context.Context, *kvtierv1.ListSequencesRequest) (*kvtierv1.ListSequencesResponse, error) {
	return &kvtierv1.ListSequencesResponse{Sequences: f.list}, nil
}

func (f *fakeDaemon) DescribeSequence(_ context.Context, r *kvtierv1.DescribeSequenceRequest) (*kvtierv1.DescribeSequenceResponse, error) {
	i := slices.IndexFunc(f.list, func(s *kvtierv1.SequenceInfo) bool { return s.GetSequenceId() == r.GetSequenceId() })
	if i < 0 {
		return nil, status.Errorf(codes.NotFound, "no sequence %s", r.GetSequenceId())
	}
	d := &kvtierv1.DescribeSequenceResponse{
		Info: f.list[i],
		Spec: &kvtierv1.ModelSpec{
			Layers: 18, QueryHeads: 4, KvHeads: 1, HeadDim: 256, KvDtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16, Softcap: 50,
			LayerKinds: slices.Repeat([]*kvtierv1.LayerKind{{SlidingWindow: 512}, {SlidingWindow: 512}, {}}, 6), Fingerprint: []byte("gemma"),
		},
		Sealed: []*kvtierv1.SealedSpan{
			{Start: 0, Limit: 2048, Tokens: 2048, SpanId: []byte("\x9f\x86\xd0\x81\x88\x4c\x7d\x65"), Bytes: 46 << 20, References: 2, BitsPerValue: 5.12, LowPlanes: true},
			{Start: 2048, Limit: 1024, Tokens: 2048, SpanId: []byte("\x60\x30\x3a\xe2\x2b\x99\x88\x61"), Bytes: 46 << 20, References: 1, BitsPerValue: 5.08},
		},
		Spans: []*kvtierv1.Span{
			{Start: 0, End: 1800, Kind: kvtierv1.SpanKind_SPAN_KIND_FILE, Label: "server/attend.go"},
			{Start: 1800, End: 4100, Kind: kvtierv1.SpanKind_SPAN_KIND_VIDEO, Label: "talk.mp4 00:01:10"},
		},
		ExactUntil: 4000,
	}
	if r.GetTokenIds() {
		d.TokenIds = []uint64{1, 504, 1 << 40}
	}
	return d, nil
}

func (f *fakeDaemon) Explain(_ context.Context, r *kvtierv1.ExplainRequest) (*kvtierv1.ExplainResponse, error) {
	if f.err != nil {
		return nil, f.err
	}
	if r.GetLayer() >= 18 {
		return nil, status.Errorf(codes.InvalidArgument, "layer %d: the sequence has 18 layers, counted from 0", r.GetLayer())
	}
	heads := []*kvtierv1.ExplainHead{
		{QueryHead: 0, MassExact: 0.41, MassRead: 0.5, MassScanned: 0.04, MassEstimated: 0.05, TrueError: 0.0141, Tokens: []*kvtierv1.ExplainToken{
			{Position: 52001, Weight: 0.312, How: "read", Text: []byte(" 7421"), TokenId: 30123, Label: "notes.txt"},
			{Position: 0, Weight: 0.22, How: "exact", Text: []byte("<s>"), TokenId: 1},
			{Position: 52000, Weight: 0.081, How: "scanned", Text: []byte(" is\n"), TokenId: 338, Label: "notes.txt"},
		}},
		{QueryHead: 1, MassExact: 0.99, MassEstimated: 0.01, TrueError: 0.0009, Tokens: []*kvtierv1.ExplainToken{
			{Position: 131071, Weight: 0.97, How: "exact", Text: []byte("\xf0\x9f"), TokenId: 9},
		}},
	}
	for _, h := range heads {
		h.Tokens = h.Tokens[:min(len(h.Tokens), int(r.GetTop()))]
	}
	return &kvtierv1.ExplainResponse{
		Position: 131071, PagesTotal: 2016, PagesScored: 2016, LeavesScored: 1612, LeavesScanned: 403, LeavesRefined: 96, ValuesRead: 801,
		Account: &kvtierv1.Account{
			TokensExact: 2320, TokensScanned: 6448, TokensRead: 801, TokensEstimated: 121503, BytesRam: 1 << 20, BytesNvme: 3 << 20,
			BytesFull: 33 << 20, BytesExactZone: 2375680, EstimatedError: 0.0171, CodecError: 0.0082, ErrorP95: 0.0402, CalibrationAudits: 118, TargetMissed: true,
			NsScore: 210_000, NsScan: 480_400, NsFetch: 1_900_000, NsExactZone: 95_000, NsTotal: 2_700_000, Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET,
		},
		Heads: heads, MassUnlabelled: .4545,
		Spans: []*kvtierv1.ExplainSpan{
			{Span: &kvtierv1.Span{Start: 51000, End: 52800, Kind: kvtierv1.SpanKind_SPAN_KIND_FILE, Label: "notes.txt"}, Mass: .4265,
				HeadMass: []float32{.85, .003}, MassRead: .38, MassScanned: .0405, MassEstimated: .006},
			{Span: &kvtierv1.Span{Start: 1, End: 51000, Kind: kvtierv1.SpanKind_SPAN_KIND_FILE, Label: "book.txt"}, Mass: .119,
				HeadMass: []float32{.221, .017}, MassExact: .11, MassEstimated: .009},
		}[:min(2, r.GetTopSpans())],
	}, nil
}

func (f *fakeDaemon) ListAudits(_ context.Context, r *kvtierv1.ListAuditsRequest) (*kvtierv1.ListAuditsResponse, error) {
	if r.GetSequenceId() == idFork {
		return &kvtierv1.ListAuditsResponse{}, nil
	}
	audits := []*kvtierv1.Audit{
		{Number: 1404, SequenceId: idBook, Layer: 5, Position: 131070, Positions: 1, Budget: &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, Share: 0.2},
			ShareRead: 0.199, EstimatedError: 0.0171, ErrorP95: 0.0402, TrueError: 0.0193, HeadErrors: []float32{0.0193}, HeadRawErrors: []float32{0.021}},
		{Number: 1405, SequenceId: idBook, Layer: 11, Position: 131071, Positions: 1, Budget: &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_TARGET, TargetError: 0.05},
			ShareRead: 0.312, EstimatedError: 0.0271, ErrorP95: 0.0489, TrueError: 0.0512, HeadErrors: []float32{0.0512}, HeadRawErrors: []float32{0.031}},
	}
	return &kvtierv1.ListAuditsResponse{
		Audits: audits[max(0, len(audits)-int(r.GetLimit())):],
		Layers: []*kvtierv1.LayerCalibration{
			{Fingerprint: []byte("gemma"), Profile: kvtierv1.Profile_PROFILE_BALANCED, Layer: 5, Budget: "share 0.15-0.3", Audits: 512, Coverage: 0.951, StatedOverTrue: 2.41, FactorMedian: 0.73, FactorP95: 2.68},
			{Fingerprint: []byte("gemma"), Profile: kvtierv1.Profile_PROFILE_BALANCED, Layer: 11, Budget: "target 0.02-0.05", Audits: 40, Coverage: 0.925, StatedOverTrue: 1.9, FactorMedian: 0.68, FactorP95: 1.31},
		},
		Gpu: &kvtierv1.GPUAudits{Compared: 77, LargestError: .031, LargestLseError: .002, GivenUp: "a kernel computes wrongly: the segments' 1228800 bytes in device memory are right"},
	}, nil
}

func (f *fakeDaemon) Residency(_ context.Context, r *kvtierv1.ResidencyRequest) (*kvtierv1.ResidencyResponse, error) {
	if r.GetSequenceId() == idFork {
		return &kvtierv1.ResidencyResponse{}, nil
	}
	return &kvtierv1.ResidencyResponse{
		Planes: []*kvtierv1.PlaneResidency{
			{Plane: "summaries", BytesTotal: 20 << 20, BytesRam: 20 << 20, BytesNvme: 20 << 20},
			{Plane: "k2", BytesTotal: 64 << 20, BytesRam: 60 << 20, BytesNvme: 64 << 20},
			{Plane: "v4", BytesTotal: 128 << 20, BytesRam: 9 << 20, BytesNvme: 128 << 20},
		},
		Layers: []*kvtierv1.LayerResidency{
			{Layer: 0, RamShare: []float32{1, 1, 0.99, 0.5, 0.01, 0, 0, 1}},
			{Layer: 1, RamShare: []float32{0, 0, 0, 0, 0.4, 0.6, 0.8, 1}},
		},
	}, nil
}

func (f *fakeDaemon) Verify(r *kvtierv1.VerifyRequest, s grpc.ServerStreamingServer[kvtierv1.VerifyResponse]) error {
	f.mu.Lock()
	f.mu.checked = append(f.mu.checked, r.GetSequenceId())
	f.mu.Unlock()
	for _, v := range f.verify {
		if err := s.Send(v); err != nil {
			return err
		}
	}
	return f.err
}

func (f *fakeDaemon) DeleteSequence(_ context.Context, r *kvtierv1.DeleteSequenceRequest) (*kvtierv1.DeleteSequenceResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.deleted = append(f.mu.deleted, r.GetSequenceId())
	return &kvtierv1.DeleteSequenceResponse{}, nil
}

func (f *fakeDaemon) Flush(_ context.Context, r *kvtierv1.FlushRequest) (*kvtierv1.FlushResponse, error) {
	if f.err != nil {
		return nil, f.err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.flushed = append(f.mu.flushed, r)
	sealed := uint64(4096)
	if r.GetSeal() {
		sealed = 4100
	}
	return &kvtierv1.FlushResponse{Ack: &kvtierv1.Ack{Accepted: 4100, CrashSafe: 4100, PowerSafe: 4100, Sealed: sealed}}, nil
}

// detailed is an error as the daemon makes them: with a reason and a delay.
func detailed(code codes.Code, message string) error {
	st, err := status.New(code, message).WithDetails(
		&errdetails.ErrorInfo{Reason: "TAILS_FULL", Domain: "kvtier"},
		&errdetails.RetryInfo{RetryDelay: durationpb.New(250_000_000)},
	)
	if err != nil {
		return err
	}
	return st.Err()
}
