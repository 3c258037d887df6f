//! The decoder once more, position by position in f64: nothing shared with what it checks.

use std::collections::BTreeMap;

use candle_core::Device;
use candle_core::quantized::QTensor;
use lorry::model::spec::{ModelSpec, Module};

use crate::tiny::{Lora, TinyModel, bias_name, weight_name};

/// `[outputs][inputs]`; a vector is one row.
type Matrix = Vec<Vec<f64>>;

pub struct Reference {
    spec: ModelSpec,
    weights: BTreeMap<String, Matrix>,
}

impl Reference {
    /// With the weights that are left after rounding to the file's type.
    pub fn new(model: &TinyModel) -> Self {
        let dequantized = |(name, weight): (&String, &candle_core::Tensor)| {
            let rounded = QTensor::quantize(weight, model.dtype_of(weight)).unwrap();
            let values = rounded.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let rows = values.chunks_exact(*weight.dims().last().unwrap());
            (name.clone(), rows.map(|row| row.iter().map(|&w| f64::from(w)).collect()).collect())
        };
        Self { spec: model.spec.clone(), weights: model.weights.iter().map(dequantized).collect() }
    }

    /// Merges an adapter: `W + s·B·A`, and its bias on top of the base's.
    pub fn merge(&mut self, lora: &Lora) {
        for (layer, sites) in lora.sites.iter().enumerate() {
            for (module, site) in Module::ALL.into_iter().zip(sites) {
                let weight = self.weights.get_mut(&weight_name(layer, module)).unwrap();
                let a: Vec<&[f32]> = site.a.chunks_exact(site.shape.0).collect();
                for (row, b) in weight.iter_mut().zip(site.b.chunks_exact(lora.rank)) {
                    for (b, a) in b.iter().zip(&a) {
                        row.iter_mut()
                            .zip(*a)
                            .for_each(|(w, a)| *w += f64::from(lora.scale) * f64::from(*b) * f64::from(*a));
                    }
                }
                if let Some(delta) = &site.bias {
                    let bias = self.weights.entry(bias_name(layer, module));
                    let bias = bias.or_insert_with(|| vec![vec![0.0; delta.len()]]);
                    bias[0].iter_mut().zip(delta).for_each(|(b, d)| *b += f64::from(*d));
                }
            }
        }
    }

    /// Logits `[position][vocab]`.
    pub fn logits(&self, tokens: &[u32]) -> Matrix {
        let embedding = &self.weights["token_embd.weight"];
        let mut hidden: Matrix = tokens.iter().map(|&token| embedding[token as usize].clone()).collect();
        for layer in 0..self.spec.num_layers {
            let normed: Matrix =
                hidden.iter().map(|h| self.norm(&format!("blk.{layer}.attn_norm.weight"), h)).collect();
            for (hidden, attended) in hidden.iter_mut().zip(self.attention(layer, &normed)) {
                add(hidden, &self.linear(layer, Module::OProj, &attended));
                let normed = self.norm(&format!("blk.{layer}.ffn_norm.weight"), hidden);
                let gate = self.linear(layer, Module::GateProj, &normed);
                let up = self.linear(layer, Module::UpProj, &normed);
                let activated: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                add(hidden, &self.linear(layer, Module::DownProj, &activated));
            }
        }
        let head = self.weights.get("output.weight").unwrap_or(embedding);
        hidden.iter().map(|h| product(head, &self.norm("output_norm.weight", h))).collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let mean_square = dot(x, x) / x.len() as f64;
        let scale = 1.0 / (mean_square + f64::from(self.spec.rms_norm_eps)).sqrt();
        x.iter().zip(&self.weights[name][0]).map(|(x, w)| x * scale * w).collect()
    }

    fn linear(&self, layer: usize, module: Module, x: &[f64]) -> Vec<f64> {
        let mut y = product(&self.weights[&weight_name(layer, module)], x);
        if let Some(bias) = self.weights.get(&bias_name(layer, module)) {
            add(&mut y, &bias[0]);
        }
        y
    }

    /// Causal grouped-query attention over all positions, before the output projection.
    fn attention(&self, layer: usize, inputs: &Matrix) -> Matrix {
        let ModelSpec { num_heads, num_kv_heads, head_dim, .. } = self.spec;
        let project = |module| -> Matrix { inputs.iter().map(|x| self.linear(layer, module, x)).collect() };
        let rotated = |module| -> Matrix {
            let rows = project(module).into_iter().enumerate();
            rows.map(|(position, mut row)| {
                row.chunks_exact_mut(head_dim).for_each(|head| self.rotate(position, head));
                row
            })
            .collect()
        };
        let (q, k, v) = (rotated(Module::QProj), rotated(Module::KProj), project(Module::VProj));
        let attend = |position: usize, head: usize| -> Vec<f64> {
            let kv_head = head / (num_heads / num_kv_heads);
            let of = |row: &[f64], head: usize| row[head * head_dim..][..head_dim].to_vec();
            let query = of(&q[position], head);
            let scores = k[..=position].iter().map(|k| dot(&query, &of(k, kv_head)) / (head_dim as f64).sqrt());
            let weights: Vec<f64> = scores.map(f64::exp).collect();
            let total: f64 = weights.iter().sum();
            let mut out = vec![0.0; head_dim];
            for (weight, v) in weights.iter().zip(&v) {
                out.iter_mut().zip(of(v, kv_head)).for_each(|(o, v)| *o += weight / total * v);
            }
            out
        };
        (0..inputs.len()).map(|position| (0..num_heads).flat_map(|head| attend(position, head)).collect()).collect()
    }

    /// Rotary embedding in Hugging Face's order: dimension i turns with i + head_dim / 2.
    fn rotate(&self, position: usize, head: &mut [f64]) {
        let half = head.len() / 2;
        for i in 0..half {
            let angle = position as f64 * f64::from(self.spec.rope_theta).powf(-(i as f64) / half as f64);
            let (x, y) = (head[i], head[i + half]);
            head[i] = x * angle.cos() - y * angle.sin();
            head[i + half] = y * angle.cos() + x * angle.sin();
        }
    }
}

fn product(matrix: &Matrix, x: &[f64]) -> Vec<f64> {
    matrix.iter().map(|row| dot(row, x)).collect()
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
