package daemon

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/knadh/koanf/parsers/toml/v2"
	"github.com/knadh/koanf/parsers/yaml"
	"github.com/knadh/koanf/providers/env/v2"
	"github.com/knadh/koanf/providers/file"
	"github.com/knadh/koanf/v2"
	"github.com/spf13/pflag"

	"kvtier/attention/kernels"
)

const envPrefix = "KVTIER_"

// foreignVariables begin as ours do, but are read elsewhere: KVTIER_ADDR is the client's.
var foreignVariables = []string{"KVTIER_ADDR", "KVTIER_CONFIG", kernels.EnvVar}

// load reads the configuration: flags before environment before file before defaults. Every
// value, wherever it comes from, goes through its flag's parser, so that all sources accept the
// same and a refusal can name its source.
func load(args, environ []string, usage io.Writer) (*Config, *actions, error) {
	c := &Config{flags: pflag.NewFlagSet("kvtierd", pflag.ContinueOnError), sources: map[string]string{}}
	c.flags.SortFlags = false
	c.flags.SetOutput(usage)
	c.flags.Usage = func() { fmt.Fprintf(usage, usageText, c.flags.FlagUsages()) }
	do := c.defineFlags()
	if err := c.flags.Parse(args); err != nil {
		return nil, nil, err
	}
	if c.flags.NArg() > 0 {
		return nil, nil, fmt.Errorf("unexpected argument %q: kvtierd takes flags only", c.flags.Arg(0))
	}
	if do.version {
		return c, do, nil
	}
	c.flags.Visit(func(f *pflag.Flag) { c.sources[f.Name] = "flag" })
	// The environment first: what is set already is not set again.
	if err := errors.Join(c.loadEnvironment(environ), c.loadFile(environ), c.finish()); err != nil {
		return nil, nil, err
	}
	return c, do, nil
}

const usageText = `kvtierd stores the attention keys and values of long contexts, and answers attention over them.

Usage: kvtierd [flags]

Every flag can also be set in a file (--config; the key is the flag's name) or by the environment
(KVTIER_READ_ALL for --read-all). A flag wins over the environment, that over the file.
KVTIER_KERNELS=go, avx2, avx512 or amx has attention computed by other loops than the fastest ones.
Sizes: 4096, 16MiB, 2GiB, 1g.

%s
Exit codes: 0 after a clean shutdown, 1 after a failure, 2 for a wrong flag or configuration.
`

func (c *Config) loadEnvironment(environ []string) error {
	k := koanf.New("\x00")
	variable := map[string]string{}
	opt := env.Opt{
		Prefix:      envPrefix,
		EnvironFunc: func() []string { return environ },
		TransformFunc: func(name, value string) (string, any) {
			if slices.Contains(foreignVariables, name) {
				return "", nil
			}
			key := strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(name, envPrefix)), "_", "-")
			variable[key] = name
			return key, value
		},
	}
	if err := k.Load(env.Provider("\x00", opt), nil); err != nil {
		return err
	}
	var errs []error
	for _, key := range k.Keys() {
		// A variable that is no setting may belong to a script around us, so it is no error.
		if c.flags.Lookup(key) == nil || !isSetting(key) {
			c.Warnings = append(c.Warnings, fmt.Sprintf("%s in the environment is no setting of kvtierd and has no effect", variable[key]))
			continue
		}
		errs = append(errs, c.set(key, k.Get(key), variable[key]))
	}
	return errors.Join(errs...)
}

func (c *Config) loadFile(environ []string) error {
	if c.File == "" {
		c.File = lookup(environ, "KVTIER_CONFIG")
	}
	if c.File == "" {
		return nil
	}
	var parser koanf.Parser
	switch filepath.Ext(c.File) {
	case ".yaml", ".yml":
		parser = yaml.Parser()
	case ".toml":
		parser = toml.Parser()
	default:
		return fmt.Errorf("configuration file %s: its name must end in .yaml, .yml or .toml", c.File)
	}
	if _, err := os.Stat(c.File); err != nil {
		return fmt.Errorf("configuration file: %w", err)
	}
	k := koanf.New("\x00")
	if err := k.Load(file.Provider(c.File), parser); err != nil {
		return fmt.Errorf("configuration file %s: %w", c.File, err)
	}
	var errs []error
	for _, key := range k.Keys() {
		// A misspelt key would silently leave a default in force.
		if c.flags.Lookup(key) == nil || !isSetting(key) {
			errs = append(errs, fmt.Errorf("configuration file %s: unknown key %q: the keys are the flags' names (kvtierd --help)",
				c.File, strings.ReplaceAll(key, "\x00", ".")))
			continue
		}
		errs = append(errs, c.set(key, k.Get(key), c.File))
	}
	return errors.Join(errs...)
}

func lookup(environ []string, name string) string {
	for _, e := range environ {
		if value, ok := strings.CutPrefix(e, name+"="); ok {
			return value
		}
	}
	return ""
}

// set gives a flag a value unless a source that comes before has done so.
func (c *Config) set(key string, value any, source string) error {
	if c.flags.Changed(key) {
		return nil
	}
	var text string
	switch v := value.(type) {
	case string:
		text = v
	case bool, int, int64, uint64:
		text = fmt.Sprint(v)
	case float64:
		text = strconv.FormatFloat(v, 'f', -1, 64)
	default:
		return fmt.Errorf("%s: %s must be one value, not %v", source, key, value)
	}
	if err := c.flags.Set(key, text); err != nil {
		return fmt.Errorf("%s: %w", source, err)
	}
	c.sources[key] = source
	return nil
}

// print writes the configuration as a YAML file that gives the same configuration again.
func (c *Config) print(w io.Writer) {
	resolved := map[string]string{"data": c.Data, "socket": c.Socket, "fast-socket": c.FastSocket}
	c.flags.VisitAll(func(f *pflag.Flag) {
		if !isSetting(f.Name) {
			return
		}
		value := f.Value.String()
		if path, ok := resolved[f.Name]; ok {
			value = path
		}
		switch f.Value.Type() {
		case "bool", "int", "float32":
		default:
			value = strconv.Quote(value)
		}
		source := c.sources[f.Name]
		if source == "" {
			source = "default"
		}
		fmt.Fprintf(w, "%s: %s # %s\n", f.Name, value, source)
	})
}
