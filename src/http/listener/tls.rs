//! The certificate that connections are encrypted with, read from the files that the configuration names.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio_rustls::rustls::{self, Error};

use crate::config::ServerConfig;

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{set} is set and {empty} is empty: set both to encrypt connections, or neither")]
    Half { set: &'static str, empty: &'static str },
    #[error(
        "server.tls_certificate {path}: {reason}; it must be a file of certificates in PEM, the server's own first"
    )]
    Certificate { path: PathBuf, reason: String },
    #[error(
        "server.tls_key {path}: {reason}; it must be a file with the certificate's private key in PEM, not encrypted"
    )]
    Key { path: PathBuf, reason: String },
    #[error(
        "server.tls_key {key} is not the key of the first certificate in server.tls_certificate {certificate}: name two \
         files that belong together"
    )]
    Mismatch { certificate: PathBuf, key: PathBuf },
}

/// `None` where connections are not to be encrypted.
///
/// # Errors
/// One file is named without the other, or a file cannot be read, is not what it should be, or does not belong to the other.
pub fn acceptor(config: &ServerConfig) -> Result<Option<TlsAcceptor>, TlsError> {
    let (certificate, key) = (config.tls_certificate.as_path(), config.tls_key.as_path());
    match [certificate, key].map(|path| path.as_os_str().is_empty()) {
        [true, true] => return Ok(None),
        // Not when the configuration is read: the two may come from different layers of it.
        [true, false] => return Err(TlsError::Half { set: "server.tls_key", empty: "server.tls_certificate" }),
        [false, true] => return Err(TlsError::Half { set: "server.tls_certificate", empty: "server.tls_key" }),
        [false, false] => {}
    }
    let identity = read_identity(certificate, key)?;
    // Named, since another crate may ask for another provider, and then there would be no default one.
    let versions = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has cipher suites of TLS 1.2 and 1.3");
    let mut tls = versions.with_no_client_auth().with_cert_resolver(Arc::new(SingleCertAndKey::from(identity)));
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(tls))))
}

fn read_identity(certificate: &Path, key: &Path) -> Result<CertifiedKey, TlsError> {
    let bad_certificate = |reason| TlsError::Certificate { path: certificate.to_owned(), reason };
    let bad_key = |reason| TlsError::Key { path: key.to_owned(), reason };
    let chain: Vec<_> = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<_, _>>)
        .map_err(|error| bad_certificate(reason(error, "certificate")))?;
    if chain.is_empty() {
        return Err(bad_certificate(reason(pem::Error::NoItemsFound, "certificate")));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| bad_key(reason(error, "private key")))?;
    let private = ring::sign::any_supported_type(&private)
        .map_err(|_| bad_key("its key is damaged, or none of RSA, ECDSA (P-256, P-384) and Ed25519".to_owned()))?;
    let identity = CertifiedKey::new(chain, private);
    match identity.keys_match() {
        Ok(()) => Ok(identity),
        Err(Error::InconsistentKeys(_)) => {
            Err(TlsError::Mismatch { certificate: certificate.to_owned(), key: key.to_owned() })
        }
        Err(_) => Err(bad_certificate("its first certificate is damaged".to_owned())),
    }
}

/// Why a file has nothing of `kind`. The reader's own words would show bytes, and those of a key are nobody's business.
fn reason(error: pem::Error, kind: &str) -> String {
    match error {
        pem::Error::Io(error) => error.to_string(),
        pem::Error::NoItemsFound => format!("there is no {kind} in it"),
        _ => "it is not whole PEM".to_owned(),
    }
}
