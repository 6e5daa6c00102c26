package pgcheck

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// ServeOptions are those of Serve.
type ServeOptions struct {
	// Data is the data directory; it is made when it is empty.
	Data string
	// Bin holds initdb and postgres; "" looks in Debian's places.
	Bin  string
	Port int
	// SharedBuffers as PostgreSQL writes it.
	SharedBuffers string
	// Socket is a directory for a unix socket, or "" for TCP alone.
	Socket string
	// Listen is an address, or * for all.
	Listen string
	// AsRoot is what BuildAsRoot made, or "": then root gives up to the user postgres.
	AsRoot string
	// Stderr takes what initdb says.
	Stderr *os.File
}

// Serve becomes a PostgreSQL server: it makes the data directory if there is
// none, with checksums on, and then replaces this process. Anybody who reaches
// the port may do anything: it is for addresses that lead nowhere.
//
// PostgreSQL refuses root, so Serve started as root gives up to the user
// postgres, whom it adds to /etc/passwd in an image without him.
func Serve(ctx context.Context, o ServeOptions) error {
	bin, err := findBin(o.Bin)
	if err != nil {
		return err
	}
	uid, gid := os.Getuid(), os.Getgid()
	if uid == 0 {
		if uid, gid, err = postgresUser(); err != nil {
			return err
		}
	}
	// The user must be able to walk there; only the directory itself is private.
	if err := os.MkdirAll(filepath.Dir(o.Data), 0o755); err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	if err := os.Mkdir(o.Data, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("data directory: %w", err)
	}
	if os.Getuid() == 0 {
		if err := os.Chown(o.Data, uid, gid); err != nil {
			return fmt.Errorf("data directory: %w", err)
		}
	}
	env := append(slices.DeleteFunc(os.Environ(), func(kv string) bool {
		// neither the image's locale nor its time zone may matter
		return strings.HasPrefix(kv, "LC_") || strings.HasPrefix(kv, "LANG") || strings.HasPrefix(kv, "TZ=") || strings.HasPrefix(kv, "PG")
	}), "TZ=GMT", "LC_ALL=C")
	if o.AsRoot != "" {
		env = append(env, "LD_PRELOAD="+o.AsRoot, fmt.Sprintf("PGCHECK_UID=%d", uid))
	}
	if _, err := os.Stat(filepath.Join(o.Data, "PG_VERSION")); errors.Is(err, os.ErrNotExist) {
		if err := initialize(ctx, o, bin, uid, gid, env); err != nil {
			return err
		}
	} else if err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	return become(o, bin, uid, gid, env)
}

func findBin(dir string) (string, error) {
	dirs := []string{dir}
	if dir == "" {
		found, err := filepath.Glob("/usr/lib/postgresql/*/bin")
		if err != nil {
			return "", err
		}
		slices.Sort(found)
		slices.Reverse(found)
		dirs = append(found, "/usr/local/bin", "/usr/bin")
	}
	for _, d := range dirs {
		if _, err := os.Stat(filepath.Join(d, "initdb")); err == nil {
			return d, nil
		}
	}
	return "", fmt.Errorf("no initdb in %s: install postgresql", strings.Join(dirs, ", "))
}

// postgresUser finds or makes the user. Debian's own id differs from machine to
// machine, and does not matter.
func postgresUser() (uid, gid int, err error) {
	u, err := user.Lookup("postgres")
	if err != nil {
		const id = 5432
		f, err := os.OpenFile("/etc/passwd", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			return 0, 0, fmt.Errorf("add the user postgres: %w", err)
		}
		_, err = fmt.Fprintf(f, "postgres:x:%d:%d::/var/lib/postgresql:/bin/sh\n", id, id)
		if err = errors.Join(err, f.Close()); err != nil {
			return 0, 0, fmt.Errorf("add the user postgres: %w", err)
		}
		return id, id, nil
	}
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	return uid, gid, errors.Join(err1, err2)
}

func initialize(ctx context.Context, o ServeOptions, bin string, uid, gid int, env []string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "initdb"), "--pgdata="+o.Data, "--data-checksums",
		"--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale")
	cmd.Env = env
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = o.Stderr, o.Stderr // the shard's log
	if os.Getuid() == 0 && o.AsRoot == "" {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("initdb: %w", err)
	}
	hba, err := os.OpenFile(filepath.Join(o.Data, "pg_hba.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("pg_hba.conf: %w", err)
	}
	_, err = fmt.Fprintln(hba, "host all all 0.0.0.0/0 trust")
	if err = errors.Join(err, hba.Close()); err != nil {
		return fmt.Errorf("pg_hba.conf: %w", err)
	}
	return nil
}

// become replaces this process. syscall's set functions change all threads.
func become(o ServeOptions, bin string, uid, gid int, env []string) error {
	if os.Getuid() == 0 && o.AsRoot == "" {
		if err := syscall.Setgroups(nil); err != nil {
			return fmt.Errorf("setgroups: %w", err)
		}
		if err := syscall.Setgid(gid); err != nil {
			return fmt.Errorf("setgid: %w", err)
		}
		if err := syscall.Setuid(uid); err != nil {
			return fmt.Errorf("setuid: %w", err)
		}
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	path := filepath.Join(bin, "postgres")
	args := []string{path, "-D", o.Data, "-p", strconv.Itoa(o.Port)}
	for _, kv := range []string{
		"listen_addresses=" + o.Listen,
		"shared_buffers=" + o.SharedBuffers,
		"unix_socket_directories=" + o.Socket,
		"huge_pages=off", // CRIU does not carry hugetlb pages
		"timezone=GMT",
		"log_timezone=GMT",
	} {
		args = append(args, "-c", kv)
	}
	return fmt.Errorf("start %s: %w", path, syscall.Exec(path, args, env))
}
