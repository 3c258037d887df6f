//! A base of which only the shapes matter.

// Each test that includes this uses its part.
#![allow(dead_code)]

use lorry::model::gguf::GgufError;
use lorry::model::spec::{Architecture, Features, ModelSpec, Module};
use lorry::model::{BaseWeights, VocabularyMatrix};

#[derive(Debug)]
pub struct Shapes(pub ModelSpec);

impl Shapes {
    /// `heads` are those of the queries, and of keys and values.
    pub fn new(
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_layers: usize,
        heads: (usize, usize),
    ) -> Self {
        Self(ModelSpec {
            architecture: Architecture::Llama,
            hidden_size,
            intermediate_size,
            num_layers,
            num_heads: heads.0,
            num_kv_heads: heads.1,
            head_dim: hidden_size / heads.0,
            vocab_size,
            rope_theta: 10_000.0,
            norm_eps: 1e-5,
            context_length: 128,
            features: Features::PLAIN,
        })
    }

    pub fn tiny() -> Self {
        Self::new(100, 8, 12, 2, (2, 1))
    }
}

impl BaseWeights for Shapes {
    fn spec(&self) -> &ModelSpec {
        &self.0
    }

    /// Every row has the norm 1.
    fn dequantize_row(&self, _: usize, _: Module, _: usize, values: &mut [f32]) -> Result<(), GgufError> {
        values.fill((values.len() as f32).powf(-0.5));
        Ok(())
    }

    /// Row `token` of both is `token`, `token + 1` and so on.
    fn dequantize_token(&self, _: VocabularyMatrix, token: usize, values: &mut [f32]) {
        values.iter_mut().zip(token..).for_each(|(value, at)| *value = at as f32);
    }

    fn bits_per_weight(&self, _: VocabularyMatrix) -> f64 {
        4.0
    }

    fn bias(&self, _: usize, _: Module) -> Result<Option<Vec<f32>>, GgufError> {
        Ok(None)
    }
}
