//! The decoder once more, position by position in f64: nothing shared with what it checks.

use std::collections::BTreeMap;

use candle_core::Device;
use candle_core::quantized::QTensor;
use lorry::model::spec::{ModelSpec, Module};

use crate::tiny::peft::{PREFIX, PeftAdapter};
use crate::tiny::{Lora, TinyModel, bias_name, weight_name};

/// `[outputs][inputs]`; a vector is one row.
type Matrix = Vec<Vec<f64>>;

pub struct Reference {
    spec: ModelSpec,
    weights: BTreeMap<String, Matrix>,
    /// Embeddings before those of the tokens.
    prompt: Matrix,
    /// Keys and values before those of the tokens, by layer.
    prefix: Vec<[Matrix; 2]>,
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
        let weights = model.weights.iter().map(dequantized).collect();
        let prefix = vec![[Matrix::new(), Matrix::new()]; model.spec.num_layers];
        Self { spec: model.spec.clone(), weights, prompt: Matrix::new(), prefix }
    }

    /// Merges an adapter: `W + s·B·A`, and its bias on top of the base's.
    pub fn merge(&mut self, lora: &Lora) {
        for (layer, sites) in lora.sites.iter().enumerate() {
            for (module, site) in Module::PLAIN.into_iter().zip(sites) {
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

    /// Logits `[token][vocab]`.
    pub fn logits(&self, tokens: &[u32]) -> Matrix {
        let embedding = &self.weights["token_embd.weight"];
        let embedded = tokens.iter().map(|&token| embedding[token as usize].clone());
        let mut hidden: Matrix = self.prompt.iter().cloned().chain(embedded).collect();
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
        let real = &hidden[self.prompt.len()..];
        real.iter().map(|h| product(head, &self.norm("output_norm.weight", h))).collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let mean_square = dot(x, x) / x.len() as f64;
        let scale = 1.0 / (mean_square + f64::from(self.spec.norm_eps)).sqrt();
        x.iter().zip(&self.weights[name][0]).map(|(x, w)| x * scale * w).collect()
    }

    fn linear(&self, layer: usize, module: Module, x: &[f64]) -> Vec<f64> {
        let mut y = product(&self.weights[&weight_name(layer, module)], x);
        if let Some(bias) = self.weights.get(&bias_name(layer, module)) {
            add(&mut y, &bias[0]);
        }
        y
    }

    /// Merges an adapter as PEFT applies it, at a strength that scales low-rank pairs and their biases.
    pub fn apply(&mut self, adapter: &PeftAdapter, strength: f64) {
        let flag = |name: &str| adapter.config[name].as_bool().unwrap_or(false);
        let rank = adapter.config["r"].as_f64().unwrap_or(1.0);
        let alpha = adapter.config["lora_alpha"].as_f64().unwrap_or(0.0);
        let scale = strength * alpha / if flag("use_rslora") { rank.sqrt() } else { rank };
        let tensor = |key: &str| -> Option<Matrix> {
            let (shape, values) = adapter.tensors.get(key).filter(|(shape, _)| !shape.contains(&0))?;
            let rows = values.chunks_exact(*shape.last().unwrap());
            Some(rows.map(|row| row.iter().map(|&v| f64::from(v)).collect()).collect())
        };
        let matrix = |path: &str| tensor(&format!("{PREFIX}{path}"));
        let times = |row: &[f64], factor: f64| row.iter().map(|value| factor * value).collect::<Vec<_>>();
        // Before the embedding changes: a tied head does not follow it.
        let tied = self.weights["token_embd.weight"].clone();
        let head = self.weights.entry("output.weight".into()).or_insert(tied);
        if let (Some(a), Some(b)) = (matrix("lm_head.lora_A.weight"), matrix("lm_head.lora_B.weight")) {
            add_pair(head, scale, &a, &b);
        }
        if let Some(saved) = matrix("lm_head.weight") {
            *head = saved;
        }
        let embedding = |part: &str| matrix(&format!("model.embed_tokens.lora_embedding_{part}"));
        if let (Some(a), Some(b)) = (embedding("A"), embedding("B")) {
            let embedding = self.weights.get_mut("token_embd.weight").unwrap();
            add_pair(embedding, scale, &transposed(&b), &transposed(&a));
        }
        for layer in 0..self.spec.num_layers {
            for module in Module::PLAIN {
                let path = format!("model.layers.{layer}.{}.{}", module.parent(), module.name());
                let of = |name: &str| matrix(&format!("{path}.{name}"));
                let weight = self.weights.get_mut(&weight_name(layer, module)).unwrap();
                if let (Some(a), Some(b)) = (of("lora_A.weight"), of("lora_B.weight")) {
                    add_pair(weight, scale, &a, &b);
                }
                if let (Some(a), Some(b), Some(e)) = (of("lora_A"), of("lora_B"), of("lora_E")) {
                    let scale = strength * alpha / (adapter.config["init_r"].as_f64().unwrap() + 1e-5);
                    let a: Matrix = a.iter().zip(&e).map(|(row, e)| times(row, e[0])).collect();
                    add_pair(weight, scale, &a, &b);
                }
                if let (Some(of_ranks), Some(of_outputs)) = (of("vera_lambda_d"), of("vera_lambda_b")) {
                    let [a, b] = ["base_model.vera_A", "base_model.vera_B"].map(|key| tensor(key).unwrap());
                    let num_inputs = weight[0].len();
                    let a: Matrix = a.iter().zip(&of_ranks[0]).map(|(row, d)| times(&row[..num_inputs], *d)).collect();
                    let b: Matrix = b.iter().zip(&of_outputs[0]).map(|(row, factor)| times(row, *factor)).collect();
                    add_pair(weight, strength, &a, &b);
                }
                if let Some(block) = of("miss_block") {
                    // `[rank, out]`; input k belongs to rank k modulo the rank.
                    for (output, row) in weight.iter_mut().enumerate() {
                        row.iter_mut().enumerate().for_each(|(k, w)| *w += strength * block[k % block.len()][output]);
                    }
                }
                if let Some(magnitude) = of("lora_magnitude_vector") {
                    for (row, magnitude) in weight.iter_mut().zip(&magnitude[0]) {
                        let norm = dot(row, row).sqrt();
                        row.iter_mut().for_each(|w| *w *= magnitude / norm);
                    }
                }
                // `[1][in]` scales inputs, `[out][1]` outputs.
                let vector = of("ia3_l");
                if let Some([inputs]) = vector.as_deref() {
                    weight.iter_mut().for_each(|row| row.iter_mut().zip(inputs).for_each(|(w, l)| *w *= l));
                } else if let Some(outputs) = &vector {
                    weight.iter_mut().zip(outputs).for_each(|(row, l)| row.iter_mut().for_each(|w| *w *= l[0]));
                    if let Some(bias) = self.weights.get_mut(&bias_name(layer, module)) {
                        bias[0].iter_mut().zip(outputs).for_each(|(b, l)| *b *= l[0]);
                    }
                }
                if let Some(delta) = of("lora_B.bias") {
                    let bias = self.weights.entry(bias_name(layer, module));
                    let bias = bias.or_insert_with(|| vec![vec![0.0; delta[0].len()]]);
                    bias[0].iter_mut().zip(&delta[0]).for_each(|(b, d)| *b += scale * d);
                }
            }
        }
        let Some((shape, values)) = adapter.tensors.get("prompt_embeddings") else { return };
        let rows = values.chunks_exact(shape[1]).map(|row| row.iter().map(|&v| f64::from(v)).collect());
        if adapter.config["peft_type"] == "PREFIX_TUNING" {
            let width = self.spec.num_kv_heads * self.spec.head_dim;
            for row in rows.collect::<Matrix>() {
                for (slice, part) in row.chunks_exact(width).enumerate() {
                    self.prefix[slice / 2][slice % 2].push(part.to_vec());
                }
            }
        } else {
            self.prompt = rows.collect();
        }
    }

    /// Causal grouped-query attention over all positions, before the output projection.
    fn attention(&self, layer: usize, inputs: &Matrix) -> Matrix {
        let ModelSpec { num_heads, num_kv_heads, head_dim, .. } = self.spec;
        let project = |module| -> Matrix { inputs.iter().map(|x| self.linear(layer, module, x)).collect() };
        let rotated = |module| -> Matrix {
            let rows = project(module).into_iter().enumerate();
            rows.map(|(position, mut row)| {
                let position = self.prefix[layer][0].len() + position;
                row.chunks_exact_mut(head_dim).for_each(|head| self.rotate(position, head));
                row
            })
            .collect()
        };
        let [prefix_k, prefix_v] = &self.prefix[layer];
        let after = |prefix: &Matrix, rows: Matrix| -> Matrix { prefix.iter().cloned().chain(rows).collect() };
        let (q, k) = (rotated(Module::QProj), after(prefix_k, rotated(Module::KProj)));
        let v = after(prefix_v, project(Module::VProj));
        let attend = |position: usize, head: usize| -> Vec<f64> {
            let kv_head = head / (num_heads / num_kv_heads);
            let of = |row: &[f64], head: usize| row[head * head_dim..][..head_dim].to_vec();
            let query = of(&q[position], head);
            let scores =
                k[..=prefix_k.len() + position].iter().map(|k| dot(&query, &of(k, kv_head)) / (head_dim as f64).sqrt());
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

/// `weight += scale · b · a`, for `a` `[rank][in]` and `b` `[out][rank]`.
fn add_pair(weight: &mut Matrix, scale: f64, a: &Matrix, b: &Matrix) {
    for (row, b) in weight.iter_mut().zip(b) {
        for (b, a) in b.iter().zip(a) {
            row.iter_mut().zip(a).for_each(|(w, a)| *w += scale * b * a);
        }
    }
}

fn transposed(matrix: &Matrix) -> Matrix {
    (0..matrix[0].len()).map(|column| matrix.iter().map(|row| row[column]).collect()).collect()
}
