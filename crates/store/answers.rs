//! What a store answers, as one of the errors a person can act on.

use std::io::ErrorKind;

use crate::Error;

/// The system's number for links that lead to each other (ELOOP), which [`ErrorKind`] has no stable name for: nothing is there.
const LINK_LOOP: i32 = if cfg!(target_os = "linux") { 40 } else { 62 };

impl Error {
    /// Whether what is there is no whole Parquet file, or one that nobody could read.
    pub fn is_no_shard(&self) -> bool {
        matches!(
            self,
            Self::NotParquet { .. }
                | Self::Cut { .. }
                | Self::Encrypted { .. }
                | Self::Corrupt { .. }
                | Self::LongFooter { .. }
                | Self::Folder { .. }
                | Self::Malformed { .. }
        )
    }

    /// The input is another one than before.
    pub(crate) fn changed(uri: &str) -> Self {
        let source =
            object_store::Error::Precondition { path: uri.to_owned(), source: "another version is there now".into() };
        Self::Changed { uri: uri.to_owned(), source }
    }

    /// Sorts a store's answer about `uri` into the cases a person can act on.
    pub(crate) fn store(uri: &str, source: object_store::Error) -> Self {
        let uri = uri.to_owned();
        match (&source, io_kind(&source)) {
            (object_store::Error::NotFound { .. }, _) => Self::NotFound { uri, source },
            (object_store::Error::AlreadyExists { .. }, _) => Self::Exists { uri },
            (object_store::Error::Precondition { .. }, _) => Self::Changed { uri, source },
            (object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. }, _)
            | (_, Some(ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem)) => {
                Self::Permission { uri, source }
            }
            (_, Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)) => {
                Self::StorageFull { uri, source }
            }
            (_, Some(ErrorKind::NotFound | ErrorKind::NotADirectory)) => Self::NotFound { uri, source },
            _ => Self::Store { uri, source },
        }
    }
}

/// The operating system's reason, wherever in the chain a store has put it.
fn io_kind(error: &(dyn std::error::Error + 'static)) -> Option<ErrorKind> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            let is_loop = io.raw_os_error() == Some(LINK_LOOP);
            return Some(if is_loop { ErrorKind::NotFound } else { io.kind() });
        }
        next = error.source();
    }
    None
}
