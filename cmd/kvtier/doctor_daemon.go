package main

import (
	"context"
	"strings"
	"time"

	"google.golang.org/grpc/health/grpc_health_v1"

	"kvtier/cmd/internal/buildinfo"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

// services are what a daemon reports its health for.
var services = []string{
	kvtierv1.InspectionService_ServiceDesc.ServiceName,
	kvtierv1.SequenceService_ServiceDesc.ServiceName,
}

// checkDaemon asks the daemon about itself; nil if it does not answer.
func (a *app) checkDaemon(ctx context.Context, c *client, d *diagnosis) *kvtierv1.GetStatusResponse {
	start := time.Now()
	s, err := c.GetStatus(ctx, &kvtierv1.GetStatusRequest{})
	if err != nil {
		d.add(fail("daemon", "", "%s", a.explainError(&verbError{err}).message))
		return nil
	}
	d.add(ok("daemon", "%s answers, up %s", a.addr, duration(time.Duration(s.GetUptimeSeconds())*time.Second)))
	d.add(checkRoundTrip(time.Since(start)), checkHealth(ctx, c), checkVersion(s.GetVersion()), checkDamage(s))
	return s
}

func checkRoundTrip(took time.Duration) finding {
	if took > time.Second {
		return warn("round trip", "the daemon or the machine is overloaded", "the first call took %v", took.Round(time.Millisecond))
	}
	return ok("round trip", "under a second, connecting included")
}

func checkHealth(ctx context.Context, c *client) finding {
	var bad []string
	for _, service := range append([]string{""}, services...) {
		r, err := c.health.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: service})
		name := service
		if name == "" {
			name = "the daemon as a whole"
		}
		if err != nil {
			return fail("health", "is this address a kvtierd?", "no answer for %s: %v", name, err)
		}
		if r.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
			bad = append(bad, name+" is "+r.GetStatus().String())
		}
	}
	if len(bad) > 0 {
		return fail("health", "it may be starting or stopping: see its log", "%s", strings.Join(bad, ", "))
	}
	return ok("health", "serving: %s", strings.Join(services, ", "))
}

func checkVersion(daemon string) finding {
	if mine := buildinfo.Version(); mine != daemon {
		return warn("version", "use programs of one build", "the daemon is %s, kvtier is %s", orDash(daemon), mine)
	}
	return ok("version", "%s, as kvtier", daemon)
}

func checkDamage(s *kvtierv1.GetStatusResponse) finding {
	var found uint64
	for _, t := range s.GetTiers() {
		found += t.GetCorruptions()
	}
	if found > 0 {
		return fail("stored bytes", "run 'kvtier verify', and check the disk", "%s damaged pieces were met since the daemon started", count(found))
	}
	return ok("stored bytes", "no damage met since the daemon started")
}
