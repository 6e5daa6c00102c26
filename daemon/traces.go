package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// TracesConfig is where traces of migrations go.
type TracesConfig struct {
	// Endpoint is the URL of an OpenTelemetry collector that takes OTLP over HTTP,
	// such as http://127.0.0.1:4318/v1/traces; "" keeps traces off.
	Endpoint string `toml:"endpoint"`
}

func (c TracesConfig) validate() error {
	if c.Endpoint == "" {
		return nil
	}
	u, err := url.Parse(c.Endpoint)
	if err != nil {
		return fmt.Errorf("traces.endpoint: %w", err)
	}
	if u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return fmt.Errorf("traces.endpoint: %q is not http://HOST:PORT/PATH or https://…", c.Endpoint)
	}
	return nil
}

// openTraces returns where to write traces, nil without a collector. A collector
// that is away costs a bounded queue and a warning in the log.
func openTraces(ctx context.Context, cfg TracesConfig, node, version string, log *slog.Logger) (trace.Tracer, func() error, error) {
	if cfg.Endpoint == "" {
		return nil, func() error { return nil }, nil
	}
	exporter, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(cfg.Endpoint))
	if err != nil {
		return nil, nil, fmt.Errorf("traces: %w", err)
	}
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("traces", "err", err) }))
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(resource.NewSchemaless(
		attribute.String("service.name", "transhipd"), attribute.String("service.version", version), attribute.String("host.name", node))))
	return provider.Tracer("github.com/tranship/tranship"), func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace/4)
		defer cancel()
		if err := provider.Shutdown(ctx); err != nil {
			return fmt.Errorf("traces: %w", err)
		}
		return nil
	}, nil
}
