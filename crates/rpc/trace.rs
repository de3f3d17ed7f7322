//! Traces: a span for each call and each of its shards, sent to an OpenTelemetry collector by OTLP. A call continues the trace
//! of its client, where it names one by W3C's `traceparent`.

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tonic::metadata::MetadataMap;
use tracing::{Span, Subscriber, field};
use tracing_opentelemetry::{OpenTelemetryLayer, OpenTelemetrySpanExt};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::registry::LookupSpan;

const SERVICE: &str = "capsieve";
/// For spans that wait to be sent when the worker ends.
const LAST_SPANS: Duration = Duration::from_secs(5);
/// The collector has so long to take spans.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// Where spans go.
pub struct Traces {
    provider: SdkTracerProvider,
}

impl Traces {
    /// Sends spans to an OTLP collector over gRPC, in batches beside the work; what it cannot take is dropped. Must be called
    /// in a runtime. OpenTelemetry's own environment variables for headers, resources and sampling are honoured.
    ///
    /// # Errors
    /// The endpoint is no address.
    pub fn to(endpoint: &str) -> Result<Self, ExporterBuildError> {
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(EXPORT_TIMEOUT);
        let mut resource = Resource::builder();
        if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
            resource = resource.with_service_name(SERVICE);
        }
        let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter.build()?)
            .with_resource(resource.with_attribute(version).build())
            .build();
        Ok(Self { provider })
    }

    /// What sees our spans, whatever the log shows.
    pub fn layer<S: Subscriber + for<'span> LookupSpan<'span>>(&self) -> impl Layer<S> + use<S> {
        let ours = Targets::new().with_target(SERVICE, LevelFilter::INFO);
        OpenTelemetryLayer::new(self.provider.tracer(SERVICE)).with_filter(ours)
    }

    /// Sends what is left.
    pub fn end(self) {
        if let Err(error) = self.provider.shutdown_with_timeout(LAST_SPANS) {
            tracing::warn!("the last spans were not sent: {error}");
        }
    }
}

/// The span of a call.
pub(crate) fn call(request_id: &str, metadata: &MetadataMap) -> Span {
    let span = tracing::info_span!(
        "call",
        request_id,
        otel.name = "capsieve.v1.ScoringService/ScoreBatch",
        otel.kind = "server",
        otel.status_code = field::Empty,
        otel.status_description = field::Empty,
        rpc.grpc.status_code = field::Empty,
    );
    // Fails where no traces are sent.
    drop(span.set_parent(TraceContextPropagator::new().extract(&Headers(metadata))));
    span
}

struct Headers<'a>(&'a MetadataMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        ["traceparent", "tracestate"].into_iter().filter(|key| self.0.contains_key(*key)).collect()
    }
}
