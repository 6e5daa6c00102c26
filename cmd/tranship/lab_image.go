package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/tranship/tranship/integration/lab"
)

func newLabImage(g *globals) *cobra.Command {
	var spec lab.ImageSpec
	var cmdFlag []string
	cmd := &cobra.Command{
		Use:   "image --name REF (--rootfs DIR | --bin PATH…) [--cmd CMD] [-- CMD ARG…]",
		Short: "Make an image of a root file system or of this machine's programs, on every host",
		Long: "Make an image and import it on every host. Programs come with their libraries, scripts with their\n" +
			"interpreter, directories with all below; everything keeps its path. --cmd is a command line, a JSON\n" +
			"array, or, given several times, one word each; so is what follows --.",
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			words := args
			if dash := cmd.ArgsLenAtDash(); dash >= 0 {
				words, spec.Cmd = args[:dash], args[dash:]
			}
			// `--bin a b c` reads like three programs, so it is.
			spec.Bins = append(spec.Bins, words...)
			if len(cmdFlag) > 0 {
				if len(spec.Cmd) > 0 {
					return usagef("--cmd and a command after -- say the same: give one")
				}
				var err error
				if spec.Cmd, err = commandWords(cmdFlag); err != nil {
					return usagef("%w", err)
				}
			}
			if (spec.Rootfs == "") == (len(spec.Bins) == 0) {
				return usagef("give either --rootfs or --bin")
			}
			l, err := lab.Open()
			if err != nil {
				return err
			}
			return l.Image(cmd.Context(), g.namespace, spec)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&spec.Name, "name", "", "reference of the image")
	flags.StringVar(&spec.Rootfs, "rootfs", "", "directory that becomes the image's root")
	flags.StringArrayVar(&spec.Bins, "bin", nil, "program, script or directory of this machine (repeatable)")
	flags.StringArrayVar(&cmdFlag, "cmd", nil, "what a container runs (default: the first program)")
	flags.StringArrayVar(&spec.Env, "env", nil, "environment variable K=V (repeatable)")
	flags.StringVar(&spec.User, "user", "", "user that a container runs as")
	_ = cmd.MarkFlagRequired("name")
	return cmd
}

// commandWords reads --cmd: several are words, one is a command line or JSON.
func commandWords(given []string) ([]string, error) {
	if len(given) > 1 {
		return given, nil
	}
	line := strings.TrimSpace(given[0])
	if strings.HasPrefix(line, "[") {
		var words []string
		if err := json.Unmarshal([]byte(line), &words); err != nil {
			return nil, fmt.Errorf("--cmd %s: %w", line, err)
		}
		return words, nil
	}
	return splitWords(line)
}

// splitWords splits like a shell that knows quotes and backslashes only.
func splitWords(line string) ([]string, error) {
	var words []string
	var word strings.Builder
	inWord, quote, escaped := false, rune(0), false
	for _, r := range line {
		switch {
		case escaped:
			word.WriteRune(r)
			escaped = false
		case r == '\\' && quote != '\'':
			inWord, escaped = true, true
		case quote != 0:
			if r == quote {
				quote = 0
			} else {
				word.WriteRune(r)
			}
		case r == '\'' || r == '"':
			inWord, quote = true, r
		case unicode.IsSpace(r):
			if inWord {
				words = append(words, word.String())
				word.Reset()
				inWord = false
			}
		default:
			inWord = true
			word.WriteRune(r)
		}
	}
	if quote != 0 || escaped {
		return nil, fmt.Errorf("--cmd %s: a quote is not closed", line)
	}
	if inWord {
		words = append(words, word.String())
	}
	return words, nil
}
