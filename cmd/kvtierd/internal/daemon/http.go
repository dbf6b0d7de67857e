package daemon

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/pprof"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// pages are what is served over HTTP: metrics, health, and profiles if asked for. They are served
// while the data folder is still being recovered, so that a supervisor can tell that from a death.
type pages struct {
	server  *http.Server
	ready   atomic.Bool
	metrics atomic.Pointer[http.Handler]
}

func newPages(withProfiles bool) *pages {
	p := &pages{}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", p.health)
	mux.HandleFunc("GET /metrics", p.serveMetrics)
	if withProfiles {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	p.server = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	return p
}

func (p *pages) serve(l net.Listener) error {
	if err := p.server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// open makes the pages show g and report that the daemon is ready.
func (p *pages) open(g prometheus.Gatherer) {
	// A collector that fails must not hide all others.
	h := promhttp.HandlerFor(g, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError})
	p.metrics.Store(&h)
	p.ready.Store(true)
}

func (p *pages) health(w http.ResponseWriter, _ *http.Request) {
	if !p.ready.Load() {
		http.Error(w, "not serving", http.StatusServiceUnavailable)
		return
	}
	_, _ = io.WriteString(w, "ok\n")
}

func (p *pages) serveMetrics(w http.ResponseWriter, r *http.Request) {
	h := p.metrics.Load()
	if h == nil {
		http.Error(w, "recovering the data folder", http.StatusServiceUnavailable)
		return
	}
	(*h).ServeHTTP(w, r)
}
