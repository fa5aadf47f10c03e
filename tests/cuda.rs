//! The CUDA build, whole, on a driver and cuBLAS without a GPU (`kernels/emulate/driver.cpp`): what it asks of them is
//! checked there, and what it computes is what the processor does.

use crate::emulated::library;
use crate::util::{Ran, column, dataset, litgpt_in, tiny};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

/// Folder of the driver's libraries, or `None` (said on stdout) where there is no C++ compiler.
fn driver() -> Option<&'static Path> {
    static DRIVER: LazyLock<Option<(tempfile::TempDir, PathBuf)>> = LazyLock::new(|| {
        let (folder, driver) = library("driver.cpp", "libcuda.so")?;
        std::os::unix::fs::symlink(&driver, folder.path().join("libcublas.so")).unwrap();
        Some((folder, driver))
    });
    DRIVER.as_ref().and_then(|(_, driver)| driver.parent())
}

/// Runs the binary with the driver; settings are split at blanks.
fn run(cwd: &Path, env: &[(&str, &str)], args: &str) -> Option<Ran> {
    let env = [env, &[("LD_LIBRARY_PATH", driver()?.to_str().unwrap()), ("LITGPT_TF32", "0")]].concat();
    Some(litgpt_in(cwd, &env, args.split_whitespace()))
}

/// Arguments of two short steps.
fn training(more: &str) -> String {
    format!(
        "finetune lora --checkpoint_dir {} --data JSON --data.json_path {} --lora_key true --lora_mlp true --lr 2e-3 \
         --train.max_steps 2 --train.global_batch_size 2 --train.max_seq_length 20 --train.lr_warmup_steps 1 \
         --eval.max_iters 1 --eval.max_new_tokens 1 {more}",
        tiny().display(),
        dataset().display()
    )
}

#[test]
fn training_is_that_of_the_processor() {
    let folder = tempfile::tempdir().unwrap();
    for (what, limit) in [("32-true", 1e-4), ("bf16-true", 2e-2), ("32-true --quantize nf4-dq", 1e-4)] {
        let precision = what.replace("bf16-true", "32-true");
        let host = training(&format!("--accelerator cpu --precision {precision} --out_dir host"));
        let card = training(&format!("--accelerator cuda --precision {what} --out_dir card"));
        let Some(host) = run(folder.path(), &[], &host) else { return };
        host.ok();
        let said = run(folder.path(), &[("EMULATED_CUDA_PAGEABLE", "1")], &card).unwrap().ok();
        assert!(said.stderr.contains("Emulated CUDA card"), "{said:#?}");
        for name in ["loss", "val_loss"] {
            let [host, card] = ["host", "card"].map(|out| column(&folder.path().join(out), name));
            assert!(!host.is_empty() && host.len() == card.len(), "{what} {name}: {host:?}, {card:?}");
            for (host, card) in host.iter().zip(&card) {
                assert!((host - card).abs() <= limit, "{what} {name}: {host} and {card}");
            }
        }
    }
    let base =
        format!("generate --checkpoint_dir {} --accelerator cuda --max_new_tokens 2 --prompt Hello", tiny().display());
    run(folder.path(), &[], &base).unwrap().ok();
    let answer = |accelerator: &str| {
        let args = format!(
            "generate --checkpoint_dir host/final --accelerator {accelerator} --precision 32-true --temperature 0 \
             --max_new_tokens 3 --prompt Hello"
        );
        run(folder.path(), &[], &args).unwrap().ok().stdout
    };
    assert_eq!(answer("cuda"), answer("cpu"));
}

#[test]
fn a_full_card_is_said() {
    let folder = tempfile::tempdir().unwrap();
    for megabytes in [1, 40] {
        let memory = (megabytes << 20).to_string();
        let args = training("--accelerator cuda --precision 32-true --out_dir out");
        let Some(ran) = run(folder.path(), &[("EMULATED_CUDA_MEMORY", &memory)], &args) else { return };
        assert!(ran.refused(1, &[]).stderr.contains("memory"));
    }
}

/// The tests of the model on a device, with this backend instead of the emulated one.
#[test]
fn golden_models_by_the_driver() {
    let Some(driver) = driver() else { return };
    let test = |name: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([name, "--exact", "--nocapture"]).env("LD_LIBRARY_PATH", driver);
        command.env("LITGPT_TEST_DEVICE", "cuda").env("LITGPT_TF32", "0").output().unwrap()
    };
    for name in ["device::golden_lora_on_a_device", "device::a_base_in_16_bits_on_a_device"] {
        let ran = test(name);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        // A name that is no test's would succeed, too.
        let done = ran.status.success() && text(&ran.stdout).contains("1 passed");
        assert!(done, "{name}: {}\n{}", text(&ran.stdout), text(&ran.stderr));
    }
}
