package failpoint

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestAnUnarmedPointDoesNothing(t *testing.T) {
	if err := hit(t.Context(), filepath.Join(t.TempDir(), "x"), "x"); err != nil {
		t.Fatal(err)
	}
}

func TestAnErrorPointFailsOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, []byte("error disk on fire\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := hit(t.Context(), path, "x")
	if err == nil || err.Error() != "failpoint x: disk on fire" {
		t.Fatalf("first hit: %v", err)
	}
	if _, err := os.Stat(path + ".hit"); err != nil {
		t.Fatal(err)
	}
	if err := hit(t.Context(), path, "x"); err != nil {
		t.Fatalf("second hit: %v", err)
	}
}

func TestAPausedPointWaitsForItsRelease(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, []byte("pause"), 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- hit(t.Context(), path, "x") }()
	deadline := time.After(10 * time.Second)
	for {
		if _, err := os.Stat(path + ".hit"); err == nil {
			break
		}
		select {
		case err := <-done:
			t.Fatalf("returned before the release: %v", err)
		case <-deadline:
			t.Fatal("never reported the hit")
		default:
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestAPausedPointObeysItsContext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, []byte("pause"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("why")
	cancel(why)
	if err := hit(ctx, path, "x"); !errors.Is(err, why) {
		t.Fatal(err)
	}
}

func TestAnUnknownActionIsAnError(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, []byte("explode"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := hit(t.Context(), path, "x"); err == nil {
		t.Fatal("accepted")
	}
}
