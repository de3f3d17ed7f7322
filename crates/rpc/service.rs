//! The methods of the contract.

use std::sync::{Arc, OnceLock};

use capsieve_worker::{ItmToken, Worker};
use tokio::sync::watch;
use tonic::{Code, Request, Response, Status};
use tracing::Instrument;

use crate::chunks::Format;
use crate::deadline::Deadline;
use crate::gate::{Admission, Admitted};
use crate::outbox::Messages;
use crate::refusal::CallName;
use crate::serve::{Limits, Phase};
use crate::stream::Driver;
use crate::v1::scoring_service_server::ScoringService;
use crate::{codec, request, status, stream, trace, v1};

/// The service of a worker.
pub(crate) struct Scoring {
    /// None until the model is loaded.
    pub(crate) worker: Arc<OnceLock<Arc<Worker>>>,
    pub(crate) limits: Limits,
    pub(crate) phase: watch::Receiver<Phase>,
    pub(crate) admission: Admission,
}

impl Scoring {
    fn worker(&self) -> Result<&Arc<Worker>, Status> {
        let loading = || status::with_reason(Code::Unavailable, "NOT_READY", "the worker is loading its model");
        self.worker.get().ok_or_else(loading)
    }

    /// Everything between a request and its first message.
    async fn open(
        &self,
        request: Request<v1::ScoreBatchRequest>,
        request_id: String,
    ) -> Result<(Driver, Admitted), Status> {
        let worker = self.worker()?;
        let place = self.admission.admit()?;
        let deadline = request.extensions().get::<Deadline>().map(|deadline| deadline.0);
        let call = request::convert(request.into_inner(), worker.info().heads)?;
        let format = Format { heads: call.heads, thresholds: call.thresholds };
        let mut phase = self.phase.clone();
        let call = tokio::select! {
            opened = worker.call(call) => opened.map_err(|error| status::of(&error))?,
            () = stream::expired(deadline) => {
                return Err(status::late("the call's deadline passed while its shards were listed"));
            }
            _ = phase.wait_for(|phase| *phase == Phase::Cut) => return Err(status::draining()),
        };
        let (info, shards) = (worker.info(), call.shards());
        tracing::info!(shards = shards.len(), "call accepted");
        let started = v1::ScoreStarted {
            model_hash: info.hash.clone(),
            device: info.device.clone(),
            precision: info.precision.to_owned(),
            shards,
            request_id: request_id.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let (progress, shards) = (call.progress().clone(), started.shards.len());
        let driver = Driver {
            started,
            events: call.start(),
            progress,
            shards,
            format,
            deadline,
            interval: self.limits.progress_interval,
            stall_timeout: self.limits.stall_timeout,
            phase: self.phase.clone(),
            request_id,
        };
        Ok((driver, place))
    }
}

#[tonic::async_trait]
impl ScoringService for Scoring {
    type ScoreBatchStream = Messages;

    async fn score_batch(&self, request: Request<v1::ScoreBatchRequest>) -> Result<Response<Messages>, Status> {
        let request_id = request_id(&request)?;
        let span = trace::call(&request_id, request.metadata());
        let opening = self.open(request, request_id.clone()).instrument(span.clone());
        let (driver, place) = opening.await.map_err(|status| {
            let _entered = span.enter();
            stream::ended(Some(&status));
            status::for_request(status, &request_id)
        })?;
        Ok(Response::new(span.in_scope(|| driver.start(place))))
    }

    async fn get_model_info(
        &self,
        _: Request<v1::GetModelInfoRequest>,
    ) -> Result<Response<v1::GetModelInfoResponse>, Status> {
        let info = self.worker()?.info();
        let heads = [(info.heads.itm, v1::Head::Itm), (info.heads.cosine, v1::Head::Cosine)];
        let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Response::new(v1::GetModelInfoResponse {
            model: info.model.clone(),
            model_hash: info.hash.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            heads: heads.into_iter().filter(|(on, _)| *on).map(|(_, head)| head.into()).collect(),
            itm_token: if info.itm_token == ItmToken::Cls { "cls" } else { "enc" }.to_owned(),
            device: info.device.clone(),
            precision: info.precision.to_owned(),
            image_size: number(info.image_size),
            caption_tokens_max: number(info.tokens_max),
            batch_images_max: number(info.batch_images),
            message_bytes_max: self.limits.message_bytes as u64,
            calls_max: number(self.limits.calls),
            pairs_items_max: number(codec::ITEMS_MAX),
            pairs_captions_max: number(codec::CAPTIONS_MAX),
        }))
    }
}

/// The client's name for its call, or ours.
fn request_id(request: &Request<v1::ScoreBatchRequest>) -> Result<String, Status> {
    let given = &request.get_ref().request_id;
    request::check_id(given)?;
    let made = || request.extensions().get().cloned().unwrap_or_else(CallName::new).0;
    Ok(if given.is_empty() { made() } else { given.clone() })
}
