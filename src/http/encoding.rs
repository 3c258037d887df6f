//! `Content-Encoding` of requests: gzip is decoded, what is not known is refused.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;

/// What can be decoded, beside plain bodies, and its other name.
const GZIP: &str = "gzip";
const OLD_GZIP: &str = "x-gzip";
const PLAIN: &str = "identity";

/// Lets a request through whose body can be read, with the name of its encoding as the layer that decodes it knows that, or
/// answers 415.
pub async fn check(mut request: Request, next: Next) -> Response {
    match encoding(request.headers()) {
        Ok(encoding) => {
            let headers = request.headers_mut();
            headers.remove(header::CONTENT_ENCODING);
            headers.extend(encoding.map(|name| (header::CONTENT_ENCODING, HeaderValue::from_static(name))));
            next.run(request).await
        }
        Err(encoding) => {
            let mut refusal = ApiError::unsupported_encoding(&encoding).into_response();
            refusal.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static(GZIP));
            refusal
        }
    }
}

/// Names are those of RFC 9110, in any case.
///
/// # Errors
/// What is not known, as which several count, one in the other.
fn encoding(headers: &HeaderMap) -> Result<Option<&'static str>, String> {
    let lines = headers.get_all(header::CONTENT_ENCODING).iter();
    let lines: Vec<_> = lines.map(|line| String::from_utf8_lossy(line.as_bytes())).collect();
    let names = lines.iter().flat_map(|line| line.split(',')).map(str::trim);
    let names: Vec<_> = names.filter(|name| !name.is_empty() && !name.eq_ignore_ascii_case(PLAIN)).collect();
    match names[..] {
        [] => Ok(None),
        [one] if [GZIP, OLD_GZIP].iter().any(|name| one.eq_ignore_ascii_case(name)) => Ok(Some(GZIP)),
        _ => Err(names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodings_are_known_in_any_case_and_by_their_other_name() {
        for (lines, expected) in [
            (&[][..], Ok(None)),
            (&["gzip"], Ok(Some(GZIP))),
            (&["GZIP"], Ok(Some(GZIP))),
            (&[" x-gzip"], Ok(Some(GZIP))),
            (&["X-GZip"], Ok(Some(GZIP))),
            (&["gzip, identity"], Ok(Some(GZIP))),
            (&["identity", "gzip,"], Ok(Some(GZIP))),
            (&["Identity"], Ok(None)),
            (&[""], Ok(None)),
            (&["br"], Err("br")),
            (&["gzipped"], Err("gzipped")),
            (&["gzip, x-gzip"], Err("gzip, x-gzip")),
            (&["gzip", "GZIP"], Err("gzip, GZIP")),
            (&["deflate, identity"], Err("deflate")),
        ] {
            let headers = lines.iter().map(|line| (header::CONTENT_ENCODING, HeaderValue::from_static(line)));
            assert_eq!(encoding(&headers.collect()), expected.map_err(str::to_owned), "{lines:?}");
        }
    }
}
