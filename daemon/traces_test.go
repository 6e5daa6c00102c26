package daemon

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/protobuf/proto"
)

func TestTracesReachACollector(t *testing.T) {
	got := make(chan *collector.ExportTraceServiceRequest, 1)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		raw, err := io.ReadAll(r.Body)
		req := &collector.ExportTraceServiceRequest{}
		if err == nil {
			err = proto.Unmarshal(raw, req)
		}
		if err != nil || r.URL.Path != "/v1/traces" {
			t.Errorf("%s: %v", r.URL, err)
		}
		got <- req
	}))
	defer srv.Close()
	tracer, stop, err := openTraces(t.Context(), TracesConfig{Endpoint: srv.URL + "/v1/traces"}, "host-1", "1.2", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	_, span := tracer.Start(t.Context(), "migrate")
	span.End()
	if err := stop(); err != nil { // sends what waits
		t.Fatal(err)
	}
	req := <-got
	spans := req.GetResourceSpans()[0]
	if name := spans.GetScopeSpans()[0].GetSpans()[0].GetName(); name != "migrate" {
		t.Errorf("span %q", name)
	}
	attrs := map[string]string{}
	for _, a := range spans.GetResource().GetAttributes() {
		attrs[a.GetKey()] = a.GetValue().GetStringValue()
	}
	if attrs["service.name"] != "transhipd" || attrs["host.name"] != "host-1" {
		t.Errorf("%v", attrs)
	}
	if tracer, stop, err := openTraces(t.Context(), TracesConfig{}, "host-1", "", nil); tracer != nil || err != nil || stop() != nil {
		t.Errorf("without a collector: %v %v", tracer, err)
	}
}
