// Package daemon is what kvtierd does around a server: configuration, logs, sockets, health,
// metrics, signals and shutdown. It knows the server only as a Backend.
package daemon
