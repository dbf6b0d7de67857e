package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"kvtier/cmd/internal/place"
	"kvtier/cmd/internal/size"
)

// Config is all that can be set about a daemon. A key in a configuration file is the flag's name;
// an environment variable is KVTIER_ and the flag's name in capitals, with _ for -.
type Config struct {
	Data            string
	Socket          string // "": no gRPC on a Unix socket
	FastSocket      string // "": no fast path
	Listen          string // "": no gRPC over TCP
	AllowRemote     bool
	Metrics         string // "": no HTTP
	PProf           bool
	RAM, Disk, Tail size.Bytes
	Promote         size.Bytes // a second; 0: no limit
	GPU             GPU
	GPUDevice       int
	GPUAudit        float32
	GPUChooseAbove  int
	GPUSeal         bool
	GPUPrefetch     bool
	ReadAll         int
	ReadAllInRAM    float32
	ByPage          bool
	Share, Audit    float32
	ReadWait        time.Duration // 0: as long as it takes
	Steer           bool
	SyncInterval    time.Duration
	ShutdownTimeout time.Duration
	LogLevel        slog.Level
	LogFormat       string

	// File is the configuration file, if one was read.
	File string
	// Warnings are for the log, once there is one.
	Warnings []string

	flags   *pflag.FlagSet
	sources map[string]string
}

// actions are flags that say what to do rather than how: they are in no file and no variable.
type actions struct {
	printConfig, version bool
}

// defineFlags binds c's fields to flags, with the defaults.
func (c *Config) defineFlags() *actions {
	var do actions
	c.RAM, c.Disk, c.Tail, c.Promote = 1<<30, 20<<30, 2<<30, 256<<20
	f := c.flags
	f.StringVar(&c.File, "config", "", "configuration file, .yaml or .toml (or KVTIER_CONFIG)")
	f.StringVar(&c.Data, "data", place.DataDir(), "data folder; made if missing")
	f.StringVar(&c.Socket, "socket", "", `Unix socket for gRPC, mode 0600; "" disables (default DATA/`+place.SocketName+`)`)
	f.StringVar(&c.FastSocket, "fast-socket", "", `Unix socket for the fast path, mode 0600; "" disables (default DATA/`+place.FastSocketName+`)`)
	f.StringVar(&c.Listen, "listen", "127.0.0.1:7420", `TCP address for gRPC; "" disables`)
	f.BoolVar(&c.AllowRemote, "allow-remote", false, "accept addresses that other machines can reach: there is no authentication yet")
	f.StringVar(&c.Metrics, "metrics", "127.0.0.1:7421", `HTTP address for /metrics and /healthz; "" disables`)
	f.BoolVar(&c.PProf, "pprof", false, "also serve /debug/pprof on the metrics address")
	c.GPU = GPUAuto
	f.Var(&c.GPU, "gpu", "limit of what lies in the memory of a GPU; auto: what it has free, if there is one; off: none")
	f.IntVar(&c.GPUDevice, "gpu-device", 0, "number of the GPU")
	f.Float32Var(&c.GPUAudit, "gpu-audit", 0.01, "share of the GPU's answers that the host compares with its own, in the background: at most a twentieth of one core's time; and of the segments that the GPU seals")
	f.IntVar(&c.GPUChooseAbove, "gpu-choose-above", 0, "where the GPU holds more than this many tokens of a layer, calls in mode budget have it read the pages that matter most, as many as the budget says, of these the values of tokens that count, and estimate the others; 0: it reads all that it holds")
	f.BoolVar(&c.GPUPrefetch, "gpu-prefetch", true, "bring segments of a layer to the GPU when the layer before was asked for, as far as there is room or they are used more than others: off, when they were asked for")
	f.BoolVar(&c.GPUSeal, "gpu-seal", true, "seal on the GPU, where there is one: the same bytes as on the host")
	f.Var(&c.RAM, "ram", "limit of what lies in RAM of sealed segments")
	f.Var(&c.Disk, "disk", "limit of the NVMe tier")
	f.Var(&c.Promote, "promote", "bytes a second that are brought from NVMe into RAM because queries read them there, at most; 0: as many as the disk gives")
	f.Var(&c.Tail, "tail", "limit of unquantised rows in RAM")
	f.IntVar(&c.ReadAll, "read-all", 8192, "contexts of up to this many tokens are read whole")
	f.Float32Var(&c.ReadAllInRAM, "read-all-in-ram", 0.1, "budgets of at least this share of the stored bytes are answered from everything where all of it lies in RAM: that takes less time than a choice; answers then depend on what lies there; 0: none")
	f.BoolVar(&c.ByPage, "by-page", true, "answer other budgets from whole pages: three times as many cache lines as the budget says, about as many blocks from NVMe, in a third to two thirds of the time; off: choose line by line, and read no more than the budget")
	f.Float32Var(&c.Share, "share", 0.2, "share of the stored bytes that a query may read when it names no budget")
	f.DurationVar(&c.ReadWait, "read-wait", 0, "longest wait of a sparse call for reads of keys and values from NVMe, when it names none: what is late is estimated; 0: as long as it takes")
	f.Float32Var(&c.Audit, "audit", 0.01, "share of sparse calls that are also answered from everything, in the background")
	f.BoolVar(&c.Steer, "steer", false, "divide a share among layers and heads by how much their answers erred before: answers then depend on what was asked before")
	f.DurationVar(&c.SyncInterval, "sync-interval", 20*time.Millisecond, "the log of open tails is synced to disk this often")
	f.DurationVar(&c.ShutdownTimeout, "shutdown-timeout", 10*time.Second, "longest wait for calls in flight at shutdown")
	f.TextVar(&c.LogLevel, "log-level", slog.LevelInfo, "debug, info, warn or error")
	f.StringVar(&c.LogFormat, "log-format", "text", "text or json")
	f.BoolVar(&do.printConfig, "print-config", false, "print the configuration in force, and where each value comes from, and exit")
	f.BoolVar(&do.version, "version", false, "print the version and exit")
	return &do
}

// isSetting says whether the flag of that name may also come from a file or the environment.
func isSetting(name string) bool {
	return name != "config" && name != "print-config" && name != "version" && name != "help"
}

// finish fills in what depends on other values, and checks everything.
func (c *Config) finish() error {
	for _, path := range []*string{&c.Data, &c.Socket, &c.FastSocket} {
		if err := absolute(path); err != nil {
			return err
		}
	}
	if c.Data == "" {
		return errors.New("--data is empty: name a folder")
	}
	// An empty value that was given disables; one that was not is the default.
	if !c.flags.Changed("socket") {
		c.Socket = place.Socket(c.Data)
	}
	if !c.flags.Changed("fast-socket") {
		c.FastSocket = place.FastSocket(c.Data)
	}
	return errors.Join(c.checkAddresses(), c.checkValues())
}

func absolute(path *string) error {
	if *path == "" {
		return nil
	}
	// Nobody expands ~ in a file or a variable, and a folder with that name is never meant.
	if rest, ok := strings.CutPrefix(*path, "~/"); ok {
		home, err := os.UserHomeDir()
		if err != nil {
			return fmt.Errorf("%s: %w", *path, err)
		}
		*path = filepath.Join(home, rest)
	}
	abs, err := filepath.Abs(*path)
	*path = abs
	return err
}

func (c *Config) checkAddresses() error {
	if c.Socket == "" && c.Listen == "" {
		return errors.New("--socket and --listen are both empty: nobody could reach the daemon; give one of them")
	}
	if c.Socket != "" && c.Socket == c.FastSocket {
		return fmt.Errorf("--socket and --fast-socket are both %s: they speak different protocols; give them different paths", c.Socket)
	}
	return errors.Join(c.checkTCP("listen", c.Listen), c.checkTCP("metrics", c.Metrics))
}

// checkTCP refuses an address that other machines can reach, unless that was asked for.
func (c *Config) checkTCP(flag, addr string) error {
	if addr == "" {
		return nil
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("--%s %q is no address: write HOST:PORT, such as 127.0.0.1:7420", flag, addr)
	}
	if ip := net.ParseIP(host); host == "localhost" || (ip != nil && ip.IsLoopback()) {
		return nil
	}
	if !c.AllowRemote {
		return fmt.Errorf("--%s %s can be reached from other machines, and there is no authentication yet: use a loopback address, or --allow-remote if the network is safe", flag, addr)
	}
	c.Warnings = append(c.Warnings, fmt.Sprintf("--%s %s: there is no authentication; everybody who can reach it can read and delete all contexts", flag, addr))
	return nil
}

func (c *Config) checkValues() error {
	var errs []error
	require := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	require(c.RAM > 0, "--ram %v: a limit must be above 0", c.RAM)
	require(c.GPUDevice >= 0, "--gpu-device %d: it must not be negative", c.GPUDevice)
	require(c.GPUChooseAbove >= 0, "--gpu-choose-above %d: it must not be negative", c.GPUChooseAbove)
	require(c.GPUAudit >= 0 && c.GPUAudit <= 1, "--gpu-audit %v: it must be from 0 to 1", c.GPUAudit)
	require(c.Disk > 0, "--disk %v: a limit must be above 0", c.Disk)
	require(c.Tail > 0, "--tail %v: a limit must be above 0", c.Tail)
	require(c.ReadAll >= 0, "--read-all %d: it must not be negative", c.ReadAll)
	require(c.ReadAllInRAM >= 0 && c.ReadAllInRAM <= 1, "--read-all-in-ram %v: a share is from 0 to 1", c.ReadAllInRAM)
	require(c.Share > 0 && c.Share <= 1, "--share %v: it must be above 0 and at most 1", c.Share)
	require(c.ReadWait == 0 || c.ReadWait >= time.Microsecond, "--read-wait %v: it must be 0, for as long as it takes, or at least 1us", c.ReadWait)
	require(c.Audit >= 0 && c.Audit <= 1, "--audit %v: it must be from 0 to 1", c.Audit)
	require(c.SyncInterval > 0, "--sync-interval %v: it must be above 0", c.SyncInterval)
	require(c.ShutdownTimeout > 0, "--shutdown-timeout %v: it must be above 0", c.ShutdownTimeout)
	require(c.LogFormat == "text" || c.LogFormat == "json", "--log-format %q: use text or json", c.LogFormat)
	return errors.Join(errs...)
}
