//! Every kernel of the crate runs on a device with WebGPU's default limits, as in a browser. Its
//! WGSL is valid within them, and naga translates it for Direct3D, Metal and Vulkan.

#![cfg(feature = "wgpu")]

use std::{
    collections::BTreeSet,
    env, fs,
    process::{Command, Stdio},
};

use burn::tensor::Device;
use burn_cubecl::cubecl::wgpu::{WgpuSetup, wgpu};
use futures_lite::future::block_on;
use memaop_checks::{Compiled, KERNELS, compiled_by, run_every_kernel};
use naga::{
    AddressSpace, ShaderStage,
    back::{hlsl, msl, spv},
    front::wgsl,
    proc::Layouter,
    valid::{Capabilities, ModuleInfo, ValidationFlags, Validator},
};

/// WebGPU's default limits: invocations and bytes of a workgroup, and storage buffers of a stage.
const INVOCATIONS: u32 = 256;
const WORKGROUP_BYTES: u32 = 16_384;
const STORAGE_BUFFERS: usize = 8;

/// A device with WebGPU's default limits, and with half precision if the adapter has it.
fn default_device() -> Device {
    let instance = wgpu::Instance::default();
    let adapter = block_on(instance.request_adapter(&Default::default())).expect("no adapter");
    let descriptor = wgpu::DeviceDescriptor {
        required_features: adapter.features() & wgpu::Features::SHADER_F16,
        required_limits: wgpu::Limits::default(),
        ..Default::default()
    };
    let (device, queue) = block_on(adapter.request_device(&descriptor)).unwrap();
    let setup = WgpuSetup {
        backend: adapter.get_info().backend,
        instance,
        adapter,
        device,
        queue,
    };
    Device::wgpu_options().setup(setup).init().unwrap()
}

/// The test below runs this in a process of its own, which logs what it compiles.
#[test]
#[ignore = "shaders_are_valid_everywhere runs it"]
fn run_on_a_default_device() {
    let device = default_device();
    run_every_kernel(&device);
    device.sync().unwrap();
}

#[test]
fn names_differ_without_their_modules() {
    let names = KERNELS.map(|name| name.rsplit("::").next());
    assert_eq!(BTreeSet::from(names).len(), KERNELS.len());
}

#[test]
fn shaders_are_valid_everywhere() {
    let Compiled {
        output, kernels, ..
    } = compiled_by("run_on_a_default_device");
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        let no_adapter = message.contains("no adapter");
        assert!(no_adapter && env::var_os("CI").is_none(), "{message}");
        eprintln!("skipped: no wgpu adapter");
        return;
    }

    let seen: BTreeSet<_> = kernels.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(seen, BTreeSet::from(KERNELS));
    let spirv_val = Command::new("spirv-val").arg("--version").output().is_ok();
    if !spirv_val {
        eprintln!("without spirv-val: SPIR-V is not validated");
        assert!(env::var_os("CI").is_none(), "CI installs spirv-tools");
    }
    for (name, source) in &kernels {
        let shader = Shader::parse(name, source);
        shader.is_within_limits();
        shader.translate(spirv_val);
    }
    println!("{} variants of {} kernels", kernels.len(), seen.len());
}

struct Shader<'a> {
    name: &'a str,
    source: &'a str,
    module: naga::Module,
    info: ModuleInfo,
}

impl<'a> Shader<'a> {
    fn parse(name: &'a str, source: &'a str) -> Self {
        let module = wgsl::parse_str(source).unwrap_or_else(|error| {
            panic!("{name}: {}\n{source}", error.emit_to_string(source));
        });
        let extensions = [
            ("enable f16", Capabilities::SHADER_FLOAT16),
            // If the adapter has 64-bit integers, CubeCL computes the upper halves of products
            // with them, even if the device was not asked for them.
            ("u64(", Capabilities::SHADER_INT64),
        ];
        let extensions = extensions.into_iter();
        let capabilities = extensions
            .filter(|(mark, _)| source.contains(mark))
            .map(|(_, capability)| capability)
            .collect();
        let mut validator = Validator::new(ValidationFlags::all(), capabilities);
        let info = validator.validate(&module);
        let info = info.unwrap_or_else(|error| {
            panic!("{name}: {}\n{source}", error.emit_to_string(source));
        });
        Self {
            name,
            source,
            module,
            info,
        }
    }

    fn is_within_limits(&self) {
        let Self { name, module, .. } = self;
        let [entry] = &module.entry_points[..] else {
            panic!("{name}: one entry point is expected");
        };
        assert_eq!(entry.stage, ShaderStage::Compute);
        let invocations = entry.workgroup_size.iter().product::<u32>();
        assert!(
            invocations <= INVOCATIONS,
            "{name}: {invocations} invocations"
        );

        let mut layouter = Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let variables = || module.global_variables.iter().map(|(_, variable)| variable);
        let shared = variables().filter(|variable| variable.space == AddressSpace::WorkGroup);
        let bytes = shared.map(|variable| layouter[variable.ty].to_stride());
        let bytes = bytes.sum::<u32>();
        assert!(
            bytes <= WORKGROUP_BYTES,
            "{name}: {bytes} bytes of workgroup memory"
        );
        let storage =
            variables().filter(|variable| matches!(variable.space, AddressSpace::Storage { .. }));
        let count = storage.count();
        assert!(count <= STORAGE_BUFFERS, "{name}: {count} storage buffers");
    }

    /// Translates the shader to MSL, HLSL and SPIR-V.
    fn translate(&self, spirv_val: bool) {
        let Self {
            name,
            module,
            info,
            source,
        } = self;
        let options = msl::Options {
            fake_missing_bindings: true,
            lang_version: (2, 4),
            ..Default::default()
        };
        let pipeline = msl::PipelineOptions::default();
        if let Err(error) = msl::write_string(module, info, &options, &pipeline) {
            panic!("{name}: MSL: {error}\n{source}");
        }

        let options = hlsl::Options {
            shader_model: hlsl::ShaderModel::V6_2,
            fake_missing_bindings: true,
            ..Default::default()
        };
        let pipeline = hlsl::PipelineOptions::default();
        let mut text = String::new();
        let mut writer = hlsl::Writer::new(&mut text, &options, &pipeline);
        if let Err(error) = writer.write(module, info, None) {
            panic!("{name}: HLSL: {error}\n{source}");
        }

        let options = spv::Options {
            lang_version: (1, 3),
            ..Default::default()
        };
        let words = spv::write_vec(module, info, &options, None)
            .unwrap_or_else(|error| panic!("{name}: SPIR-V: {error}\n{source}"));
        if spirv_val {
            let file = tempfile::NamedTempFile::new().unwrap();
            let bytes: Vec<_> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            fs::write(file.path(), bytes).unwrap();
            let verdict = Command::new("spirv-val")
                .args(["--target-env", "vulkan1.1"])
                .arg(file.path())
                .stdout(Stdio::null())
                .output()
                .unwrap();
            let message = String::from_utf8_lossy(&verdict.stderr);
            assert!(verdict.status.success(), "{name}: {message}");
        }
    }
}
