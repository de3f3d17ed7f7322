//! Compiles `kernels/*.cu` for crates/engine: with feature `cuda` by nvcc to one fat image, with feature `emulator` by the
//! C++ compiler to a library that runs them on the CPU. Without either it does nothing.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Where `scripts/cuda-toolkit` unpacks NVIDIA's wheels.
const TOOLKIT: &str = ".cuda/nvidia/cu13";
const INSTALL: &str = "run scripts/cuda-toolkit (100 MB from PyPI), or set NVCC or CUDA_HOME to a CUDA 13.0 toolkit";

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the engine lies in crates/");
    let feature = |name: &str| std::env::var_os(format!("CARGO_FEATURE_{name}")).is_some();
    println!("cargo:rerun-if-changed={}", root.join("build.rs").display());
    if !feature("CUDA") && !feature("EMULATOR") {
        return;
    }
    for variable in ["NVCC", "CUDA_HOME", "CAPSIEVE_SANITIZE"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed={}", root.join("kernels").display());
    let nvcc = nvcc(&root).unwrap_or_else(|| panic!("no nvcc found: {INSTALL}"));
    let sources = sources(&root.join("kernels"));
    if feature("CUDA") {
        fat_image(&nvcc, &sources);
    }
    #[cfg(feature = "emulator")]
    emulator(&root, &nvcc, &sources);
}

/// nvcc: of NVCC, CUDA_HOME, our own toolkit folder, PATH.
fn nvcc(root: &Path) -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let path = variable("PATH").into_iter().flat_map(|path| std::env::split_paths(&path).collect::<Vec<_>>());
    let candidates = variable("NVCC")
        .into_iter()
        .chain(variable("CUDA_HOME").map(|home| home.join("bin/nvcc")))
        .chain([root.join(TOOLKIT).join("bin/nvcc")])
        .chain(path.map(|folder| folder.join("nvcc")))
        .collect::<Vec<_>>();
    candidates.into_iter().find(|nvcc| nvcc.is_file())
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("kernels/ is part of the repository");
    let mut found: Vec<_> = entries.map(|entry| entry.expect("a readable folder").path()).collect();
    found.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    found.sort();
    found
}

/// One image per source with machine code for the architectures we tune for and PTX for what comes later.
fn fat_image(nvcc: &Path, sources: &[PathBuf]) {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let mut list = String::from("[");
    for source in sources {
        let image = out.join(source.with_extension("fatbin").file_name().expect("a file"));
        let mut command = Command::new(nvcc);
        command.args([
            "-fatbin",
            "-O3",
            "-std=c++17",
            "-Xptxas",
            "-warn-spills,-warn-lmem-usage",
            "-Werror",
            "all-warnings",
        ]);
        for (compute, code) in [("80", "sm_80"), ("89", "sm_89"), ("90a", "sm_90a"), ("80", "compute_80")] {
            command.arg(format!("-gencode=arch=compute_{compute},code={code}"));
        }
        let done = command.arg("-o").arg(&image).arg(source).output();
        let done = done.unwrap_or_else(|error| panic!("cannot run {}: {error}: {INSTALL}", nvcc.display()));
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "nvcc failed on {}:\n{said}", source.display());
        list += &format!("include_bytes!({:?}).as_slice(), ", image.display().to_string());
    }
    std::fs::write(out.join("images.rs"), list + "]").expect("OUT_DIR is ours to write");
}

/// The kernels for the CPU. CAPSIEVE_SANITIZE=address checks every access (run the tests with libasan preloaded).
#[cfg(feature = "emulator")]
fn emulator(root: &Path, nvcc: &Path, sources: &[PathBuf]) {
    let include = nvcc.parent().and_then(Path::parent).expect("bin/nvcc").join("include");
    let folder = root.join("kernels/emulator");
    let sanitize = std::env::var("CAPSIEVE_SANITIZE").ok().filter(|name| !name.is_empty());
    let build = || {
        let mut build = cc::Build::new();
        build
            .cpp(true)
            .std("c++17")
            .opt_level(2)
            .debug(true)
            .include(&folder)
            .flag(format!("-isystem{}", include.display()));
        for quiet in ["unknown-pragmas", "attributes", "class-memaccess"] {
            build.flag(format!("-Wno-{quiet}"));
        }
        if let Some(name) = &sanitize {
            build.define("EMU_ASAN", None).flag(format!("-fsanitize={name}")).flag("-fno-omit-frame-pointer");
        }
        build
    };
    // Kernels register themselves when the program starts: the linker must not drop them as unused.
    build()
        .files(sources)
        .file(folder.join("emu_memory.cpp"))
        .flag("-include")
        .flag(folder.join("emu.h").display().to_string())
        .flag("-xc++")
        .link_lib_modifier("+whole-archive")
        .compile("capsieve_kernels");
    let mut scheduler = build();
    if let Some(name) = &sanitize {
        scheduler.flag(format!("-fno-sanitize={name}"));
        println!("cargo:rustc-link-lib=dylib=asan");
    }
    scheduler.file(folder.join("emu.cpp")).link_lib_modifier("+whole-archive").compile("capsieve_emulator");
}
