package main

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// maxReply bounds one reply: the description of a million-token sequence with its ids is 10 MiB.
const maxReply = 256 << 20

// client is one connection to the daemon.
type client struct {
	kvtierv1.InspectionServiceClient
	sequences kvtierv1.SequenceServiceClient
	health    grpc_health_v1.HealthClient
	conn      *grpc.ClientConn
}

// splitAddr says how to dial addr: unix://PATH, unix:PATH, a path, or HOST:PORT.
func splitAddr(addr string) (network, target string, err error) {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		return "unix", strings.TrimPrefix(path, "//"), nil
	}
	if strings.HasPrefix(addr, "/") || strings.HasPrefix(addr, ".") {
		return "unix", addr, nil
	}
	if _, _, err := net.SplitHostPort(addr); err != nil || strings.Contains(addr, "/") {
		return "", "", failf(exitUsage, "--addr %q is no address: use unix:///path/to/kvtier.sock or HOST:PORT", addr)
	}
	return "tcp", addr, nil
}

// connect makes a client; the connection itself is made by the first call.
func (a *app) connect() (*client, error) {
	network, target, err := splitAddr(a.addr)
	if err != nil {
		return nil, err
	}
	d := &dialer{network: network, target: target, addr: a.addr}
	// passthrough and an own dialer: gRPC's resolvers would read a path as a URL and ask proxies.
	conn, err := grpc.NewClient("passthrough:///kvtier",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(d.dial),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReply)),
		grpc.WithChainUnaryInterceptor(d.unary),
		grpc.WithChainStreamInterceptor(d.stream),
	)
	if err != nil {
		return nil, err
	}
	return &client{
		InspectionServiceClient: kvtierv1.NewInspectionServiceClient(conn),
		sequences:               kvtierv1.NewSequenceServiceClient(conn),
		health:                  grpc_health_v1.NewHealthClient(conn),
		conn:                    conn,
	}, nil
}

// dialer remembers why a connection failed, because gRPC keeps only the text of it.
type dialer struct {
	network, target, addr string

	mu struct {
		sync.Mutex
		err error
	}
}

func (d *dialer) dial(ctx context.Context, _ string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, d.network, d.target)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.err = err
	return conn, err
}

// restore puts the error of a failed dial in the place of gRPC's.
func (d *dialer) restore(err error) error {
	if status.Code(err) != codes.Unavailable {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.err == nil {
		return err
	}
	return &dialError{d.addr, d.mu.err}
}

func (d *dialer) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return d.restore(call(ctx, method, req, reply, cc, opts...))
}

func (d *dialer) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := open(ctx, desc, cc, method, opts...)
	return s, d.restore(err)
}

// call connects, runs f under the time limit and closes the connection.
func (a *app) call(cmd *cobra.Command, f func(context.Context, *client) error) error {
	return a.callFor(cmd, f, a.timeout > 0)
}

// callLong is call for verbs that may take long by their nature: no limit unless one was given.
func (a *app) callLong(cmd *cobra.Command, f func(context.Context, *client) error) error {
	return a.callFor(cmd, f, a.timeout > 0 && a.timeoutSet)
}

func (a *app) callFor(cmd *cobra.Command, f func(context.Context, *client) error, limited bool) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	defer c.conn.Close()
	ctx := cmd.Context()
	if limited {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, a.timeout)
		defer cancel()
	}
	return f(ctx, c)
}

// resolve finds the sequence that arg means: an id, else a name, else the beginning of one id.
func (c *client) resolve(ctx context.Context, arg string) (*kvtierv1.SequenceInfo, error) {
	reply, err := c.ListSequences(ctx, &kvtierv1.ListSequencesRequest{})
	if err != nil {
		return nil, err
	}
	var named, begun []*kvtierv1.SequenceInfo
	for _, s := range reply.GetSequences() {
		switch {
		case s.GetSequenceId() == arg:
			return s, nil
		case s.GetName() == arg:
			named = append(named, s)
		case strings.HasPrefix(s.GetSequenceId(), arg):
			begun = append(begun, s)
		}
	}
	if len(named) > 0 {
		return only(named, fmt.Sprintf("%d sequences have the name %q", len(named), arg))
	}
	if len(begun) > 0 {
		return only(begun, fmt.Sprintf("%d sequences' ids begin with %q", len(begun), arg))
	}
	return nil, failf(exitNotFound, "no sequence has the id or name %q: 'kvtier ls' lists them", arg)
}

func only(found []*kvtierv1.SequenceInfo, complaint string) (*kvtierv1.SequenceInfo, error) {
	if len(found) == 1 {
		return found[0], nil
	}
	var ids []string
	for _, s := range found[:min(len(found), 5)] {
		ids = append(ids, s.GetSequenceId())
	}
	more := ""
	if len(found) > 5 {
		more = ", ..."
	}
	return nil, failf(exitUsage, "%s: give an id (%s%s)", complaint, strings.Join(ids, ", "), more)
}

// withSequence runs f on the sequence that arg means.
func (a *app) withSequence(cmd *cobra.Command, arg string, f func(context.Context, *client, *kvtierv1.SequenceInfo) error) error {
	return a.call(cmd, onSequence(arg, f))
}

func onSequence(arg string, f func(context.Context, *client, *kvtierv1.SequenceInfo) error) func(context.Context, *client) error {
	return func(ctx context.Context, c *client) error {
		seq, err := c.resolve(ctx, arg)
		if err != nil {
			return err
		}
		return f(ctx, c, seq)
	}
}
