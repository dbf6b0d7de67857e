package server

// Temporary, uncommitted, by the lead: DELETE this file when fast.go defines these.

import "net"

type fastConn struct{}

func (*fastConn) stop() {}

// ServeFast is not there yet.
func (srv *Server) ServeFast(l *net.UnixListener) error { return l.Close() }
