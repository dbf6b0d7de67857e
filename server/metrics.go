package server

import (
	"strconv"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
	"kvtier/tiers/store"
)

// metrics is what /metrics shows. Its registry is its own, so that several
// servers can live in one process.
type metrics struct {
	registry   *prometheus.Registry
	attends    *prometheus.CounterVec
	seconds    *prometheus.HistogramVec
	tokens     *prometheus.CounterVec
	seals      prometheus.Counter
	evicted    prometheus.Counter
	spills     prometheus.Counter
	wakes      prometheus.Counter
	auditError prometheus.Histogram
	estimate   prometheus.Histogram
	audits     *prometheus.CounterVec
	missed     prometheus.Counter
	late       prometheus.Counter
	// of a GPU; nil where there is none
	deviceErrors prometheus.Histogram
	deviceFailed prometheus.Counter
	appended     atomic.Uint64
	answered     atomic.Uint64
}

func newMetrics(srv *Server) *metrics {
	m := &metrics{registry: prometheus.NewRegistry()}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "kvtier", Name: name, Help: help})
		m.registry.MustRegister(c)
		return c
	}
	errBuckets := prometheus.ExponentialBuckets(.0005, 2, 12)
	m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: "kvtier", Name: "appends_total",
		Help: "Appends taken in, of one layer each."}, func() float64 { return float64(m.appended.Load()) }))
	m.seals = counter("spans_sealed_total", "Spans sealed, all layers each.")
	m.spills = counter("tails_spilled_total", "Open tails whose rows in RAM were given up, for room.")
	m.wakes = counter("tails_read_back_total", "Open tails whose rows were read back from their log.")
	m.evicted = counter("sequences_evicted_total", "Sequences evicted because the disk limit was reached.")
	m.attends = prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "kvtier", Name: "attends_total",
		Help: "Answers, of one layer each, by the mode that was answered."}, []string{"mode"})
	m.seconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: "kvtier", Name: "attend_seconds",
		Help: "Time of one answer, by stage. Stages of several KV heads run at once and are summed.", Buckets: prometheus.ExponentialBuckets(20e-6, 2, 18)}, []string{"stage"})
	m.tokens = prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "kvtier", Name: "attended_tokens_total",
		Help: "Tokens by how they took part in answers, over KV heads; late ones are among the others, too."}, []string{"how"})
	m.auditError = prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "kvtier", Name: "audited_error",
		Help: "True relative error of audited answers against reading all stored bytes.", Buckets: errBuckets})
	m.audits = prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "kvtier", Name: "audits_total",
		Help: "Audits, by layer and by whether the stated 95th percentile held."}, []string{"layer", "held"})
	m.missed = counter("targets_missed_total", "Answers that said that they may err more than their target.")
	m.late = counter("attends_late_total", "Answers that did without reads which did not come in time.")
	m.estimate = prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "kvtier", Name: "estimated_error",
		Help: "Estimated relative error of sparse answers.", Buckets: errBuckets})
	m.registry.MustRegister(m.attends, m.seconds, m.tokens, m.auditError, m.estimate, m.audits,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.gauge("tail_bytes", "Unquantised rows in RAM.", func() float64 { return float64(srv.tail.Load()) })
	m.gauge("sequences", "Sequences held.", func() float64 { return float64(srv.Sequences()) })
	m.gauge("seals_pending", "Sequences waiting to be sealed.", func() float64 { return float64(srv.sealer.pending()) })
	m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: "kvtier", Name: "promoted_bytes_total",
		Help: "Bytes that were read from NVMe to be brought into RAM because queries read them."}, func() float64 { return float64(srv.store.Promoted()) }))
	for _, t := range []string{"ram", "nvme"} {
		m.tier(srv, t)
	}
	if srv.store.HasDevice() {
		m.tier(srv, "gpu")
		m.deviceErrors = prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "kvtier", Name: "gpu_audited_error",
			Help: "Largest relative difference between outputs of the GPU and of the host, by audited call.", Buckets: prometheus.ExponentialBuckets(1e-5, 2, 12)})
		m.registry.MustRegister(m.deviceErrors)
		m.gauge("gpu_pinned_bytes", "Bytes of RAM that the GPU copies from by itself.", func() float64 { return float64(srv.store.DeviceWork().Pinned) })
		m.deviceFailed = counter("gpu_given_up_total", "Audits that found the GPU to answer or to seal wrongly: it is given up then.")
		m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: "kvtier", Name: "gpu_sealed_segments_total",
			Help: "Segments, of one layer each, that the GPU made."}, func() float64 { return float64(srv.sealer.madeOnDevice.Load()) }))
		for _, c := range []struct {
			name, help string
			f          func(store.DeviceWork) int64
		}{
			{"gpu_kept_segments_total", "Segments that the GPU made and that stayed there.", func(w store.DeviceWork) int64 { return w.Kept }},
			{"gpu_ahead_segments_total", "Segments that came to the GPU before they were asked for.", func(w store.DeviceWork) int64 { return w.Ahead }},
			{"gpu_ahead_used_segments_total", "Of these, those that were attended before they had to go.", func(w store.DeviceWork) int64 { return w.AheadUsed }},
		} {
			m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: "kvtier", Name: c.name, Help: c.help},
				func() float64 { return float64(c.f(srv.store.DeviceWork())) }))
		}
	}
	return m
}

func (m *metrics) gauge(name, help string, f func() float64) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "kvtier", Name: name, Help: help}, f))
}

func (m *metrics) tier(srv *Server, name string) {
	usage := func() tiers.Usage {
		ram, nvme := srv.store.Usage()
		switch name {
		case "gpu":
			u, _ := srv.store.GPUUsage()
			return u
		case "ram":
			return ram
		}
		return nvme
	}
	labels := prometheus.Labels{"tier": name}
	for _, g := range []struct {
		name, help string
		total      bool
		f          func(tiers.Usage) int64
	}{
		{"tier_bytes", "Bytes that the tier takes.", false, func(u tiers.Usage) int64 { return u.BytesUsed }},
		{"tier_bytes_limit", "The tier's hard limit.", false, func(u tiers.Usage) int64 { return u.BytesLimit }},
		{"tier_hits_total", "Pieces wanted that were there.", true, func(u tiers.Usage) int64 { return u.Hits }},
		{"tier_misses_total", "Pieces wanted that were not there.", true, func(u tiers.Usage) int64 { return u.Misses }},
		{"tier_read_bytes_total", "Bytes transferred out of the tier.", true, func(u tiers.Usage) int64 { return u.BytesRead }},
		{"tier_written_bytes_total", "Bytes put into the tier.", true, func(u tiers.Usage) int64 { return u.BytesWritten }},
		{"tier_evictions_total", "Pieces evicted.", true, func(u tiers.Usage) int64 { return u.Evictions }},
		{"tier_corruptions_total", "Blocks that failed their checksum.", true, func(u tiers.Usage) int64 { return u.Corruptions }},
		{"tier_late_reads_total", "Reads that a call did not wait for any longer.", true, func(u tiers.Usage) int64 { return u.LateReads }},
	} {
		f := func() float64 { return float64(g.f(usage())) }
		if g.total {
			m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: "kvtier", Name: g.name, Help: g.help, ConstLabels: labels}, f))
		} else {
			m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "kvtier", Name: g.name, Help: g.help, ConstLabels: labels}, f))
		}
	}
}

// audited counts an audit.
func (m *metrics) audited(a *kvtierv1.Audit) {
	m.auditError.Observe(float64(a.TrueError))
	m.audits.WithLabelValues(strconv.Itoa(int(a.Layer)), strconv.FormatBool(a.TrueError <= a.ErrorP95)).Inc()
}

// deviceAudited counts an audit of the GPU.
func (m *metrics) deviceAudited(d difference) { m.deviceErrors.Observe(d.output) }

// observe counts an answer.
func (m *metrics) observe(a *kvtierv1.Account) {
	mode := "exact"
	switch a.Mode {
	case kvtierv1.AttendMode_ATTEND_MODE_BUDGET:
		mode = "budget"
	case kvtierv1.AttendMode_ATTEND_MODE_TARGET:
		mode = "target"
	}
	m.attends.WithLabelValues(mode).Inc()
	m.answered.Add(1)
	if a.TargetMissed {
		m.missed.Inc()
	}
	if a.TokensLate > 0 {
		m.late.Inc()
	}
	if a.TokensEstimated > 0 {
		m.estimate.Observe(float64(a.EstimatedError))
	}
	for stage, ns := range map[string]uint64{"score": a.NsScore, "scan": a.NsScan, "fetch": a.NsFetch, "exact_zone": a.NsExactZone, "total": a.NsTotal} {
		m.seconds.WithLabelValues(stage).Observe(float64(ns) / 1e9)
	}
	for how, n := range map[string]uint64{"exact": a.TokensExact, "scanned": a.TokensScanned, "read": a.TokensRead, "estimated": a.TokensEstimated, "late": a.TokensLate} {
		m.tokens.WithLabelValues(how).Add(float64(n))
	}
}
