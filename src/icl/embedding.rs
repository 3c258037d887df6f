//! An OpenAI-style `/v1/embeddings` endpoint, and ranks joined from it and from words.

use std::io::Read;
use std::time::Duration;

use serde::Deserialize;
use tracing::warn;

use super::bm25::rank_by;
use super::error::EmbeddingError;
use crate::config::IclConfig;
use crate::traces;

const TIMEOUT: Duration = Duration::from_secs(30);
/// Texts of one call.
const BATCH_LEN: usize = 64;
const MAX_REPLY_BYTES: u64 = 32 << 20;
/// Of reciprocal-rank fusion: how little the very first ranks stand out.
const RANK_OFFSET: f64 = 60.0;

/// A vector of length 1, or all zeros.
pub(super) type UnitVector = Vec<f64>;

#[derive(Debug)]
pub(super) struct EmbeddingEndpoint {
    agent: ureq::Agent,
    url: String,
    model: String,
}

#[derive(Deserialize)]
struct Reply {
    data: Vec<Embedding>,
}

#[derive(Deserialize)]
struct Embedding {
    index: usize,
    embedding: Vec<f64>,
}

impl EmbeddingEndpoint {
    /// `None` where none is configured.
    pub(super) fn new(config: &IclConfig) -> Option<Self> {
        (!config.embedding_url.is_empty()).then(|| Self {
            agent: ureq::AgentBuilder::new().timeout(TIMEOUT).build(),
            url: config.embedding_url.clone(),
            model: config.embedding_model.clone(),
        })
    }

    /// One vector per text, in order, all of one length. Blocks.
    pub(super) fn embed(&self, texts: &[&str]) -> Result<Vec<UnitVector>, EmbeddingError> {
        let mut vectors = Vec::with_capacity(texts.len());
        for batch in texts.chunks(BATCH_LEN) {
            vectors.extend(self.embed_batch(batch)?);
        }
        let len = vectors.first().map_or(0, Vec::len);
        if len == 0 || vectors.iter().any(|vector| vector.len() != len) {
            return Err(EmbeddingError("its vectors are empty or differ in length".to_owned()));
        }
        Ok(vectors)
    }

    fn embed_batch(&self, texts: &[&str]) -> Result<Vec<UnitVector>, EmbeddingError> {
        let request = serde_json::json!({"model": self.model, "input": texts, "encoding_format": "float"});
        let mut asked = self.agent.post(&self.url);
        for (name, value) in traces::headers() {
            asked = asked.set(&name, &value);
        }
        let response = asked.send_json(request).map_err(|error| {
            warn!(url = self.url, %error, "the embedding endpoint failed");
            EmbeddingError(match error {
                ureq::Error::Status(status, _) => format!("it answered with status {status}"),
                ureq::Error::Transport(transport) => transport.kind().to_string(),
            })
        })?;
        let reply: Reply = serde_json::from_reader(response.into_reader().take(MAX_REPLY_BYTES))
            .map_err(|error| EmbeddingError(format!("its reply is no list of embeddings: {error}")))?;
        let mut vectors = vec![None; texts.len()];
        for Embedding { index, embedding } in reply.data {
            if let Some(slot) = vectors.get_mut(index) {
                *slot = Some(unit(embedding));
            }
        }
        let complete = vectors.into_iter().collect::<Option<Vec<_>>>();
        complete.ok_or_else(|| EmbeddingError("it left out some of the texts".to_owned()))
    }
}

fn unit(mut vector: Vec<f64>) -> UnitVector {
    let norm = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
    if norm > 0.0 {
        vector.iter_mut().for_each(|x| *x /= norm);
    }
    vector
}

/// Documents by cosine to `query`, the nearest first; equals by index. A query of another length is an error.
pub(super) fn rank_by_cosine(documents: &[UnitVector], query: &[f64]) -> Result<Vec<usize>, EmbeddingError> {
    if documents.iter().any(|document| document.len() != query.len()) {
        return Err(EmbeddingError("its vectors differ in length".to_owned()));
    }
    let cosine = |document: &UnitVector| document.iter().zip(query).map(|(a, b)| a * b).sum();
    Ok(rank_by(&documents.iter().map(cosine).collect::<Vec<f64>>()))
}

/// Reciprocal-rank fusion of two rankings of the same documents; equals by index.
pub(super) fn fuse(one: &[usize], other: &[usize]) -> Vec<usize> {
    let mut scores = vec![0.0; one.len()];
    for ranking in [one, other] {
        for (rank, &document) in ranking.iter().enumerate() {
            scores[document] += 1.0 / (RANK_OFFSET + 1.0 + rank as f64);
        }
    }
    rank_by(&scores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_by_cosine_comes_first_whatever_its_length() {
        let documents: Vec<UnitVector> =
            [[0.0, 5.0], [9.0, 1.0], [0.1, 0.1], [0.0, 0.0]].map(|vector| unit(vector.to_vec())).to_vec();
        assert_eq!(rank_by_cosine(&documents, &unit(vec![1.0, 1.0])).unwrap(), [2, 1, 0, 3]);
        assert!(rank_by_cosine(&documents, &[1.0]).is_err());
    }

    #[test]
    fn what_both_rank_high_wins_over_what_one_ranks_first() {
        // 1/61 + 1/64 < 1/62 + 1/62
        assert_eq!(fuse(&[0, 1, 2, 3], &[3, 1, 2, 0]), [1, 0, 3, 2]);
        assert_eq!(fuse(&[1, 0], &[0, 1]), [0, 1]);
    }
}
