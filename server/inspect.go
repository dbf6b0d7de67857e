package server

import (
	"context"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
)

// inspectionService is the gRPC front end for people and tools.
type inspectionService struct {
	kvtierv1.UnimplementedInspectionServiceServer
	srv *Server
}

func (x *inspectionService) GetStatus(context.Context, *kvtierv1.GetStatusRequest) (*kvtierv1.GetStatusResponse, error) {
	srv := x.srv
	out := &kvtierv1.GetStatusResponse{Version: srv.opt.Version, DataDir: srv.opt.DataDir,
		UptimeSeconds: uint64(time.Since(srv.started).Seconds()), Leases: uint64(srv.leases.count()),
		TailBytes: uint64(max(0, srv.tail.Load())), TailBytesLimit: uint64(srv.opt.TailBytes),
		SealsPending: uint64(srv.sealer.pending()), RssBytes: residentBytes()}
	ram, nvme := srv.store.Usage()
	if u, ok := srv.store.GPUUsage(); ok {
		out.Tiers = append(out.Tiers, tierStatus("gpu", u))
	}
	out.Tiers = append(out.Tiers, tierStatus("ram", ram), tierStatus("nvme", nvme))
	for _, s := range srv.list() {
		out.Sequences++
		s.mu.RLock()
		if s.mu.holders > 0 {
			out.SequencesOpen++
		}
		s.mu.RUnlock()
	}
	out.Attends, out.Appends = srv.metrics.answered.Load(), srv.metrics.appended.Load()
	audits := srv.auditor.stats()
	out.Audits, out.AuditErrorMean, out.AuditErrorP95, out.AuditCoverage = audits.n, audits.mean, audits.p95, audits.coverage
	if out.GpuAudits = srv.auditor.deviceStats(); out.GpuAudits != nil {
		w := srv.store.DeviceWork()
		out.Gpu = &kvtierv1.GPUStatus{SegmentsSealed: uint64(srv.sealer.madeOnDevice.Load()), SegmentsKept: uint64(w.Kept), PinnedBytes: uint64(w.Pinned),
			SegmentsAhead: uint64(w.Ahead), SegmentsAheadUsed: uint64(w.AheadUsed)}
	}
	return out, nil
}

func tierStatus(name string, u tiers.Usage) *kvtierv1.TierStatus {
	return &kvtierv1.TierStatus{Name: name, BytesUsed: uint64(u.BytesUsed), BytesLimit: uint64(u.BytesLimit), Pieces: uint64(u.Pieces),
		Hits: uint64(u.Hits), Misses: uint64(u.Misses), BytesRead: uint64(u.BytesRead), BytesWritten: uint64(u.BytesWritten),
		Evictions: uint64(u.Evictions), Corruptions: uint64(u.Corruptions), LateReads: uint64(u.LateReads)}
}

// residentBytes is the process's resident set; 0 where the system does not say.
func residentBytes() uint64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	pages, _ := strconv.ParseUint(f[1], 10, 64)
	return pages * uint64(os.Getpagesize())
}

func (x *inspectionService) ListSequences(context.Context, *kvtierv1.ListSequencesRequest) (*kvtierv1.ListSequencesResponse, error) {
	out := &kvtierv1.ListSequencesResponse{}
	list := x.srv.list()
	slices.SortFunc(list, func(a, b *sequence) int {
		if c := a.created.Compare(b.created); c != 0 {
			return c
		}
		return strings.Compare(a.id, b.id)
	})
	for _, s := range list {
		out.Sequences = append(out.Sequences, x.info(s))
	}
	return out, nil
}

func (x *inspectionService) info(s *sequence) *kvtierv1.SequenceInfo {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := &kvtierv1.SequenceInfo{SequenceId: s.id, Name: s.name, Profile: kvtierv1.Profile(s.profile), Ack: s.ackLocked(),
		Open: s.mu.holders > 0, CreatedUnix: uint64(s.created.Unix()), UsedUnix: uint64(s.mu.used.Unix()), ParentId: s.parent, Damage: s.mu.damaged}
	for _, r := range s.mu.spans {
		out.SealedBytes += uint64(x.spanBytes(r.span))
		for _, h := range r.segments {
			if d := x.srv.store.Damage(h.ID); d != "" && out.Damage == "" {
				out.Damage = d
			}
		}
	}
	return out
}

func (x *inspectionService) spanBytes(sp *span) (n int64) {
	for _, h := range sp.segments {
		n += x.srv.store.Bytes(h)
	}
	return n
}

func (x *inspectionService) DescribeSequence(_ context.Context, r *kvtierv1.DescribeSequenceRequest) (*kvtierv1.DescribeSequenceResponse, error) {
	s, err := x.srv.sequence(r.SequenceId)
	if err != nil {
		return nil, err
	}
	st := s.snapshot()
	out := &kvtierv1.DescribeSequenceResponse{Info: x.info(s), Spec: s.spec.msg, Spans: st.labels, ExactUntil: min(st.exactUntil, st.accepted)}
	for _, ref := range st.spans {
		out.Sealed = append(out.Sealed, x.sealedSpan(s, ref))
		if r.TokenIds {
			out.TokenIds = append(out.TokenIds, ref.TokenIDs[:ref.limit]...)
		}
	}
	if r.TokenIds {
		out.TokenIds = append(out.TokenIds, st.ids[:min(uint64(len(st.ids)), st.accepted-st.sealed())]...)
	}
	return out, nil
}

func (x *inspectionService) sealedSpan(s *sequence, ref spanRef) *kvtierv1.SealedSpan {
	out := &kvtierv1.SealedSpan{Start: ref.Start, Limit: uint64(ref.limit), Tokens: uint64(ref.Tokens), SpanId: []byte(ref.ID),
		Bytes: uint64(x.spanBytes(ref.span)), References: uint32(x.srv.spans.references(ref.span))}
	var bytes, full int64
	for l, h := range ref.segments {
		out.LowPlanes = out.LowPlanes || x.srv.store.HasLow(h.ID)
		if s.spec.window[l] == 0 {
			full++
			bytes += x.srv.store.Bytes(h)
		}
	}
	if full > 0 {
		values := full * int64(ref.Tokens) * int64(2*s.spec.kvHeads*s.spec.headDim)
		out.BitsPerValue = 8 * float64(bytes) / float64(values)
	}
	return out
}

func (x *inspectionService) Residency(_ context.Context, r *kvtierv1.ResidencyRequest) (*kvtierv1.ResidencyResponse, error) {
	s, err := x.srv.sequence(r.SequenceId)
	if err != nil {
		return nil, err
	}
	st := s.snapshot()
	var planes [tiers.NumPlanes]*kvtierv1.PlaneResidency
	out := &kvtierv1.ResidencyResponse{}
	for l := range s.spec.layers {
		lr := &kvtierv1.LayerResidency{Layer: uint32(l)}
		for _, ref := range st.spans {
			h := ref.segments[l]
			there, all := x.residency(h, &planes)
			lr.RamShare = append(lr.RamShare, float32(there)/float32(max(1, all)))
		}
		out.Layers = append(out.Layers, lr)
	}
	for _, p := range planes {
		if p != nil {
			out.Planes = append(out.Planes, p)
		}
	}
	return out, nil
}

// residency counts a segment's pieces, and adds their bytes to planes.
func (x *inspectionService) residency(h *tiers.Header, planes *[tiers.NumPlanes]*kvtierv1.PlaneResidency) (there, all int) {
	low := x.srv.store.HasLow(h.ID)
	for head := range h.Heads {
		for p := tiers.Plane(0); p < tiers.NumPlanes; p++ {
			_, n, ok := h.Piece(head, p)
			if !ok || p.Part() == tiers.PartLow && !low {
				continue
			}
			if planes[p] == nil {
				planes[p] = &kvtierv1.PlaneResidency{Plane: p.String()}
			}
			all++
			planes[p].BytesTotal += uint64(n)
			planes[p].BytesNvme += uint64(n)
			if x.srv.store.Resident(h.ID, head, p) {
				there++
				planes[p].BytesRam += uint64(n)
			}
		}
	}
	return there, all
}

func (x *inspectionService) Verify(r *kvtierv1.VerifyRequest, st grpc.ServerStreamingServer[kvtierv1.VerifyResponse]) error {
	leave, err := x.srv.enter()
	if err != nil {
		return err
	}
	defer leave()
	list := x.srv.list()
	if r.SequenceId != "" {
		s, err := x.srv.sequence(r.SequenceId)
		if err != nil {
			return err
		}
		list = []*sequence{s}
	}
	segments, total := x.srv.segmentsToVerify(list)
	out := &kvtierv1.VerifyResponse{BytesTotal: total}
	last := time.Now()
	for _, h := range segments {
		if err := x.srv.store.Verify(st.Context(), h); err != nil {
			if st.Context().Err() != nil {
				return st.Context().Err()
			}
			if _, gone := x.srv.store.Header(h.ID); gone == nil {
				out.Damage = append(out.Damage, err.Error())
			}
		}
		out.SegmentsDone++
		out.BytesDone += uint64(x.srv.store.Bytes(h))
		if time.Since(last) > 200*time.Millisecond {
			last = time.Now()
			if err := st.Send(out); err != nil {
				return err
			}
		}
	}
	for _, s := range list {
		s.mu.RLock()
		if s.mu.damaged != "" {
			out.Damage = append(out.Damage, "sequence "+s.id+": "+s.mu.damaged)
		}
		s.mu.RUnlock()
	}
	out.Finished = true
	return st.Send(out)
}

func (x *inspectionService) ListAudits(_ context.Context, r *kvtierv1.ListAuditsRequest) (*kvtierv1.ListAuditsResponse, error) {
	if r.SequenceId != "" {
		if _, err := x.srv.sequence(r.SequenceId); err != nil {
			return nil, err
		}
	}
	return &kvtierv1.ListAuditsResponse{Audits: x.srv.auditor.list(r.SequenceId, r.After, int(min(r.Limit, auditKept))),
		Layers: x.srv.calibration.layers(), Gpu: x.srv.auditor.deviceStats()}, nil
}

// segmentsToVerify lists each segment of the sequences once.
func (srv *Server) segmentsToVerify(list []*sequence) (out []*tiers.Header, bytes uint64) {
	seen := map[tiers.ID]bool{}
	for _, s := range list {
		st := s.snapshot()
		for _, ref := range st.spans {
			for _, h := range ref.segments {
				if !seen[h.ID] {
					seen[h.ID] = true
					out = append(out, h)
					bytes += uint64(srv.store.Bytes(h))
				}
			}
		}
	}
	return out, bytes
}
