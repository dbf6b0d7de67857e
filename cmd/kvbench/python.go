package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/spf13/cobra"
)

// pythonVerbs are the verbs that a module of python/kvtier/bench carries out:
// those that need a language model. Flags are the module's own.
func pythonVerbs() []*cobra.Command {
	verb := func(name, short string) *cobra.Command {
		return &cobra.Command{
			Use:                name + " [flags]",
			Short:              short,
			DisableFlagParsing: true, // --help is the module's, too
			RunE: func(cmd *cobra.Command, args []string) error {
				return runPython(cmd, "kvtier.bench."+name, args)
			},
		}
	}
	return []*cobra.Command{
		verb("calibrate", "How well stated errors hold on a real model: coverage and a reliability diagram"),
		verb("model", "Teacher-force a real model with every layer sparse: loss, KL and agreement"),
		verb("ruler", "RULER's 13 tasks on a real model: what sparse attention retains"),
		verb("needle", "The needle grid, length by depth, on a real model, as a heat map"),
	}
}

func runPython(cmd *cobra.Command, module string, args []string) error {
	python, err := findPython()
	if err != nil {
		return err
	}
	c := exec.CommandContext(cmd.Context(), python, append([]string{"-m", module}, args...)...)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, cmd.OutOrStdout(), cmd.ErrOrStderr()
	// Ctrl-C reaches the whole process group; the module tidies up its daemon itself.
	c.Cancel = func() error { return c.Process.Signal(os.Interrupt) }
	return c.Run()
}

func findPython() (string, error) {
	if python := os.Getenv("KVTIER_PYTHON"); python != "" {
		return python, nil
	}
	python := filepath.Join(".venv", "bin", "python")
	if _, err := os.Stat(python); err != nil {
		return "", errors.New("no Python environment at .venv: run 'make venv', or name an interpreter that has the package by KVTIER_PYTHON")
	}
	return filepath.Abs(python)
}
