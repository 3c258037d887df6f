//! `/v1/files`: examples to train on.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::{FromRequest, Multipart, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::stream::try_unfold;
use schemars::JsonSchema;
use serde::Serialize;
use tempfile::NamedTempFile;
use tokio::fs;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::Allowed;
use super::listing::{ListQuery, Page};
use crate::fine_tuning::{File, FilesError};
use crate::http::AppState;
use crate::http::error::ApiError;
use crate::http::fields::PathName;

/// The only one there is.
pub const PURPOSE: &str = "fine-tune";
const MAX_LIMIT: usize = 10_000;
/// Of a field that is no file.
const MAX_TEXT_BYTES: usize = 1024;
const MAX_FILENAME_CHARS: usize = 255;
const CHUNK_BYTES: usize = 1 << 16;

#[derive(Debug, JsonSchema, Serialize)]
pub struct FileView {
    id: String,
    object: &'static str,
    bytes: u64,
    /// Unix seconds.
    created_at: u64,
    filename: String,
    purpose: &'static str,
    status: &'static str,
}

#[derive(Debug, JsonSchema, Serialize)]
pub struct DeletedFile {
    id: String,
    object: &'static str,
    deleted: bool,
}

impl From<File> for FileView {
    fn from(file: File) -> Self {
        let File { id, bytes, created_at, filename } = file;
        Self { id, object: "file", bytes, created_at, filename, purpose: PURPOSE, status: "processed" }
    }
}

/// What a form has brought.
#[derive(Debug, Default)]
struct Form {
    file: Option<(NamedTempFile, String)>,
    purpose: Option<String>,
}

/// Takes `file` and `purpose` as a form, the file straight to the disk.
pub async fn upload(
    State(state): State<AppState>,
    allowed: Allowed,
    request: Request,
) -> Result<Json<FileView>, ApiError> {
    let body_timeout_seconds = state.config.server.body_timeout_seconds;
    let form = timeout(Duration::from_secs(body_timeout_seconds), read_form(&allowed, request));
    let Form { file, purpose } = form.await.map_err(|_| ApiError::body_too_slow(body_timeout_seconds))??;
    let Some((content, filename)) = file else { return Err(ApiError::invalid("file", "`file` is required")) };
    if purpose.as_deref() != Some(PURPOSE) {
        return Err(ApiError::invalid("purpose", format!("`purpose` must be `{PURPOSE}`: no other file is used here")));
    }
    let file = allowed.blocking(move |fine_tuning| fine_tuning.files().add(content, filename)).await?;
    Ok(Json(file.into()))
}

async fn read_form(allowed: &Allowed, request: Request) -> Result<Form, ApiError> {
    let fields = Multipart::from_request(request, &()).await;
    let mut fields = fields.map_err(|e| ApiError::malformed(format!("a file comes as a form: {}", e.body_text())))?;
    let mut form = Ok(Form::default());
    // A client hears of its refusal when it has sent all: the rest is read, but no longer kept.
    while let Some(mut field) = fields.next_field().await.map_err(|e| unreadable(&e))? {
        if let Ok(fine) = &mut form
            && let Err(refusal) = fine.take(allowed, &mut field).await
        {
            form = Err(refusal);
        }
    }
    form
}

impl Form {
    async fn take(&mut self, allowed: &Allowed, field: &mut Field<'_>) -> Result<(), ApiError> {
        match field.name() {
            Some(name @ ("file" | "purpose")) if self.has(name) => {
                return Err(ApiError::invalid(name, format!("`{name}` comes twice: send one file at a time")));
            }
            Some("file") => {
                let filename: String = field.file_name().unwrap_or("file").chars().take(MAX_FILENAME_CHARS).collect();
                self.file = Some((receive(allowed, field).await?, filename));
            }
            Some("purpose") => self.purpose = Some(short_text(field).await?),
            Some(name) if name.starts_with("expires_after") => {
                return Err(ApiError::invalid("expires_after", "`expires_after`: no file expires here: leave it out"));
            }
            Some(name) => {
                let message = format!("`{name}` is not known: known are file and purpose");
                return Err(ApiError::invalid(name, message));
            }
            None => return Err(ApiError::malformed("a part of the form has no name: known are file and purpose")),
        }
        Ok(())
    }

    fn has(&self, name: &str) -> bool {
        if name == "file" { self.file.is_some() } else { self.purpose.is_some() }
    }
}

/// Writes a file to the disk as it comes.
async fn receive(allowed: &Allowed, field: &mut Field<'_>) -> Result<NamedTempFile, ApiError> {
    let failed = |e| ApiError::from(FilesError::Disk(e));
    let max_bytes = allowed.0.max_file_bytes();
    let content = allowed.0.files().begin().map_err(failed)?;
    let mut file = fs::File::from_std(content.reopen().map_err(failed)?);
    let mut num_bytes = 0;
    while let Some(chunk) = field.chunk().await.map_err(|e| unreadable(&e))? {
        num_bytes += chunk.len() as u64;
        if num_bytes > max_bytes {
            return Err(ApiError::body_too_large(usize::try_from(max_bytes).unwrap_or(usize::MAX)));
        }
        file.write_all(&chunk).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    Ok(content)
}

async fn short_text(field: &mut Field<'_>) -> Result<String, ApiError> {
    let mut text = Vec::new();
    while let Some(chunk) = field.chunk().await.map_err(|e| unreadable(&e))? {
        text.extend_from_slice(&chunk);
        if text.len() > MAX_TEXT_BYTES {
            return Err(ApiError::malformed("a field of the form is too long"));
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn unreadable(error: &MultipartError) -> ApiError {
    ApiError::malformed(format!("the form cannot be read: {}", error.body_text()))
}

/// The latest first, or by `order` the other way round.
pub async fn list(allowed: Allowed, query: ListQuery) -> Result<Json<Page<FileView>>, ApiError> {
    if query.get("purpose").is_some_and(|purpose| purpose != PURPOSE) {
        return Ok(Json(query.page(Vec::new(), |file: &FileView| &file.id, 1, MAX_LIMIT)?));
    }
    let files = allowed.blocking(|fine_tuning| Ok::<_, ApiError>(fine_tuning.files().list())).await?;
    let mut files: Vec<FileView> = files.into_iter().map(FileView::from).collect();
    match query.get("order") {
        None | Some("desc") => files.reverse(),
        Some("asc") => {}
        Some(_) => return Err(ApiError::invalid("order", "`order` must be `asc` or `desc`")),
    }
    Ok(Json(query.page(files, |file| &file.id, MAX_LIMIT, MAX_LIMIT)?))
}

pub async fn get(allowed: Allowed, PathName(id): PathName) -> Result<Json<FileView>, ApiError> {
    Ok(Json(allowed.blocking(move |fine_tuning| fine_tuning.files().get(&id)).await?.into()))
}

pub async fn content(allowed: Allowed, PathName(id): PathName) -> Result<Response, ApiError> {
    let (file, bytes) = allowed
        .blocking(move |fine_tuning| {
            let file = fine_tuning.files().get(&id)?;
            Ok::<_, FilesError>((fine_tuning.files().open_content(&id)?, file.bytes))
        })
        .await?;
    let chunks = try_unfold(fs::File::from_std(file), async |mut file| {
        let mut chunk = vec![0; CHUNK_BYTES];
        let num_read = file.read(&mut chunk).await?;
        chunk.truncate(num_read);
        Ok::<_, std::io::Error>((num_read > 0).then_some((chunk, file)))
    });
    let headers =
        [(header::CONTENT_TYPE, "application/octet-stream".to_owned()), (header::CONTENT_LENGTH, bytes.to_string())];
    Ok((StatusCode::OK, headers, Body::from_stream(chunks)).into_response())
}

/// Jobs that were made of it have it still.
pub async fn delete(allowed: Allowed, PathName(id): PathName) -> Result<Json<DeletedFile>, ApiError> {
    let deleted = id.clone();
    allowed.blocking(move |fine_tuning| fine_tuning.files().delete(&id)).await?;
    Ok(Json(DeletedFile { id: deleted, object: "file", deleted: true }))
}
