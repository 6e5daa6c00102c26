package lazypages

import "testing"

// BenchmarkFaults has a process read 256 MiB at random while it is filled, and
// prints how long its reads waited.
func BenchmarkFaults(b *testing.B) {
	for b.Loop() {
		r := newRig(b)
		r.spawn()
		r.connect()
		spec := newSpec(b, 1<<16, "read")
		spec.Dense, spec.Threads = true, 1
		task := r.restore(spec)
		task.say("go")
		r.finish()
		task.expect("ok")
		st := r.waitDone()
		b.Logf("%d faults, filled in %.0f ms", st.Faults, st.FillMs)
	}
}

// BenchmarkFill places 1 GiB in the background, with nobody waiting.
func BenchmarkFill(b *testing.B) {
	var ms, user, system float64
	for b.Loop() {
		r := newRig(b)
		r.spawn()
		r.connect()
		spec := newSpec(b, 1<<18, "hold")
		spec.Dense = true
		task := r.restore(spec)
		r.finish()
		st := r.waitDone()
		ms += st.FillMs
		if st.Placed != 1<<18 {
			b.Fatalf("placed %d pages", st.Placed)
		}
		task.kill()
		used := r.proc.cmd.ProcessState
		user += milliseconds(used.UserTime())
		system += milliseconds(used.SystemTime())
	}
	// The server's own time: what filling would take on an idle machine.
	b.ReportMetric(user/float64(b.N), "user-ms")
	b.ReportMetric(system/float64(b.N), "sys-ms")
	b.ReportMetric(ms/float64(b.N), "fill-ms")
	b.ReportMetric(float64(b.N)*1024/ms*1000, "MiB/s")
	b.ReportMetric(0, "ns/op")
}
