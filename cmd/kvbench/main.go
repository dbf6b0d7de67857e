// Command kvbench measures what kvtier's answers cost and how good they are.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

const rootHelp = `kvbench measures what kvtier's answers cost and how good they are.

Verbs that need a language model, or ggml to compare with, run the Python package of this repository: they look for
.venv/bin/python (made by 'make venv') beside the working directory, or take KVTIER_PYTHON.`

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "kvbench",
		Short:         "Measure what kvtier's answers cost and how good they are",
		Long:          rootHelp,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(newQuality(), newStorage(), newKernels(), newAttend(), newDisk(), newGPU(), newContexts(), newMillion(), newShape())
	root.AddCommand(plantedVerb())
	root.AddCommand(pythonVerbs()...)
	return root
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := newRoot().ExecuteContext(ctx)
	stop()
	var exit *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit):
		os.Exit(exit.ExitCode()) // it has said why
	default:
		fmt.Fprintln(os.Stderr, "kvbench: "+err.Error())
		os.Exit(1)
	}
}
