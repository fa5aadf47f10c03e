//! The model on a device against the same reference values as on the host: every golden case, through the launches of a
//! GPU (`emulated`).

use crate::emulated;
use crate::golden::{
    Fixture, batch, cases, check_generation, check_prefix, check_training, deviation, each, json, largest_difference,
    load_on, logits, root, within,
};
use litgpt::checkpoint::adapter;
use litgpt::ops::device::Device;
use litgpt::ops::quantized::Quantizer;
use litgpt::ops::weight::Store;
use std::path::Path;

fn check_model(device: &Device, dir: &Path) {
    let Some((_, mut gpt)) = load_on(Some(device), dir, Store::F32, None) else { return };
    let (fixture, golden) = (Fixture::read(&dir.join("golden.safetensors")), json(&dir.join("golden.json")));
    let rows = fixture.rows("input_ids");
    let want = &fixture.get("logits").1;
    within("logits / std", largest_difference(&logits(&gpt, &rows), want) / deviation(want), 1e-4);
    let tokens = batch(&rows, &rows);
    let loss = gpt.loss(&tokens, None) / tokens.n_targets() as f64;
    within("loss, relative", (loss / golden["loss"].as_f64().unwrap() - 1.0).abs() as f32, 1e-5);
    if let Some(generation) = golden.get("generation") {
        check_generation(&gpt, generation);
    }
    check_prefix(&mut gpt, 1e-5, &[false]);
    device.check().unwrap();
}

#[test]
fn golden_models_on_a_device() {
    let (Some(root), Some(device)) = (root(), emulated::device()) else { return };
    let all = each(&cases(&root, "models", "golden.safetensors"), |dir| check_model(&device, dir));
    assert!(all.is_empty(), "cases that failed: {all:?}");
}

#[test]
fn golden_lora_on_a_device() {
    let (Some(root), Some(device)) = (root(), emulated::device()) else { return };
    let all = each(&cases(&root, "lora", "golden.json"), |dir| {
        let golden = json(&dir.join("golden.json"));
        let base = root.join(golden["base_model"].as_str().unwrap());
        let Some((checkpoint, mut gpt)) = load_on(Some(&device), &base, Store::F32, None) else { return };
        if checkpoint.locate("model.layers.0.self_attn.q_proj.weight")[0].rows.is_some() {
            return;
        }
        let fixture = Fixture::read(&dir.join("train.safetensors"));
        check_training(dir, &checkpoint, &mut gpt, &fixture, &golden);
        device.check().unwrap();
    });
    assert!(all.is_empty(), "cases that failed: {all:?}");
}

/// In few bits and in 16 bits the device computes what the host does, within the type's rounding.
#[test]
fn other_types_on_a_device() {
    let (Some(root), Some(device)) = (root(), emulated::device()) else { return };
    for dir in cases(&root, "lora", "golden.json") {
        let golden = json(&dir.join("golden.json"));
        let base = root.join(golden["base_model"].as_str().unwrap());
        let rows = Fixture::read(&base.join("golden.safetensors")).rows("input_ids");
        let kinds = [None, Some("nf4"), Some("nf4-dq"), Some("fp4"), Some("int8")];
        for (store, limit) in [(Store::F32, 1e-4), (Store::Bf16, 0.25), (Store::F16, 0.03)] {
            for quantizer in kinds.map(|kind| kind.map(|kind| Quantizer::named(kind).unwrap())) {
                let host = load_on(None, &base, Store::F32, quantizer);
                let (Some((checkpoint, mut host)), Some((_, mut gpt))) =
                    (host, load_on(Some(&device), &base, store, quantizer))
                else {
                    continue;
                };
                adapter::load(&dir.join("final"), checkpoint.family, &mut host).unwrap();
                adapter::load(&dir.join("final"), checkpoint.family, &mut gpt).unwrap();
                let want = logits(&host, &rows[..1]);
                let error = largest_difference(&logits(&gpt, &rows[..1]), &want) / deviation(&want);
                within(&format!("{store:?} {quantizer:?}"), error, limit);
                // So few rows that 4-bit weights are not decoded first.
                let few = [rows[0][..5].to_vec()];
                let want = logits(&host, &few);
                let error = largest_difference(&logits(&gpt, &few), &want) / deviation(&want);
                within(&format!("{store:?} {quantizer:?}, few rows"), error, limit);
                if quantizer.is_none() {
                    check_prefix(&mut gpt, limit / 50.0, &[false]);
                }
            }
        }
    }
    device.check().unwrap();
}
