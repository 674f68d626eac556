//! Every kernel of the crate, run on a device that has no more than WebGPU's defaults, as in a browser. As CubeCL writes them
//! there, they are valid WGSL within those limits, and naga translates them to what Direct3D, Metal and Vulkan take.

#![cfg(feature = "wgpu")]

use std::{
    collections::BTreeSet,
    env, fs,
    process::{Command, Stdio},
};

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Device, Distribution, Tensor},
};
use burn_cubecl::cubecl::wgpu::{WgpuSetup, wgpu};
use burn_memaop::{
    AopConfig, AopObserver, MemAopConv2dConfig, MemAopLinearConfig, Memory, MemoryPrecision,
    Method, OuterProducts, StoredInput,
    activation::{gelu, relu},
    baseline::Baseline,
    op::{
        AopStep, InputStep, NoiseStep, PackStep, gradient_noise, input_gradient, pack,
        weight_gradient,
    },
};
use futures_lite::future::block_on;
use naga::{
    AddressSpace, ShaderStage,
    back::{hlsl, msl, spv},
    front::wgsl,
    proc::Layouter,
    valid::{Capabilities, ModuleInfo, ValidationFlags, Validator},
};

/// What every device of the standard has: invocations of a workgroup, bytes of its memory, storage buffers of a stage.
const INVOCATIONS: u32 = 256;
const WORKGROUP_BYTES: u32 = 16_384;
const STORAGE_BUFFERS: usize = 8;

/// All kernels of `op/cube/`.
const KERNELS: [&str; 26] = [
    "fold::fold_kernel",
    "fold::norm_kernel",
    "fold::score_kernel",
    "gather::gather_kernel",
    "gather::move_kernel",
    "gather::take_out_kernel",
    "images::gather_kernel",
    "images::score_kernel",
    "images::square_kernel",
    "packed::gather_packed_kernel",
    "packed::pack_kernel",
    "packed::times_kernel",
    "packed::unpack_kernel",
    "select::largest::largest_kernel",
    "select::many::largest::count_kernel",
    "select::many::largest::digit_kernel",
    "select::many::largest::place_kernel",
    "select::many::search::largest_kernel",
    "select::many::search::search_kernel",
    "select::many::share_kernel",
    "select::many::systematic::draw_kernel",
    "select::many::systematic::places_kernel",
    "select::many::variance::roots_kernel",
    "select::many::variance::sums_kernel",
    "select::systematic::systematic_kernel",
    "select::variance::variance_kernel",
];

/// A device without anything that the standard does not ask for, but half precision where it is to be had.
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

/// Run by the test below in a process of its own, which writes what it compiles to a file.
#[test]
#[ignore = "the other test runs it"]
fn run_every_kernel() {
    let device = default_device();
    for dtype in [DType::F32, DType::F16] {
        if device.supports_dtype(dtype) {
            gradients(&device, dtype);
            others(&device, dtype);
            layers(&device.clone().autodiff(), dtype);
        }
    }
    device.sync().unwrap();
}

fn random(shape: [usize; 2], device: &Device, dtype: DType) -> Tensor<2> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), (device, dtype))
}

/// Modules in another type.
struct Cast(DType);

impl Cast {
    fn of<M: Module>(mut self, module: M) -> M {
        module.map(&mut self)
    }
}

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(self.0).detach().require_grad())
    }
}

fn gradients(device: &Device, dtype: DType) {
    let methods = [
        Method::Systematic,
        Method::TopK(Memory::None),
        Method::TopK(Memory::Balanced { decay: 0.9 }),
        Method::TopK(Memory::Published { decay: 1.0 }),
        Method::Baseline(Baseline::RandK(Memory::None)),
        Method::Baseline(Baseline::WeightedK(Memory::Balanced { decay: 1.0 })),
    ];
    for (method, precision) in methods.into_iter().flat_map(|method| {
        [MemoryPrecision::Full, MemoryPrecision::F16].map(|precision| (method, precision))
    }) {
        // Of widths that are read as vectors, and of others.
        for (rows, width) in [(300, 64), (300, 7), (3000, 7)] {
            for measure in [false, true] {
                let step = AopStep {
                    k: 40,
                    method,
                    memory_precision: precision,
                    seed: 1,
                    step: 0,
                    bias: true,
                    measure,
                };
                let batch = || {
                    (
                        random([rows, width], device, dtype),
                        random([rows, 12], device, dtype),
                    )
                };
                let (x, g) = batch();
                let gradient = weight_gradient(x, g, None, step);
                let (x, g) = batch();
                weight_gradient(x, g, gradient.memory, step);
            }
        }
    }
}

fn others(device: &Device, dtype: DType) {
    for rows in [300, 5000] {
        let (x, g) = (
            random([rows, 70], device, dtype),
            random([rows, 12], device, dtype),
        );
        for sampled in [false, true] {
            let step = InputStep {
                k: 40,
                sampled,
                seed: 1,
                step: 0,
            };
            input_gradient(g.clone(), random([70, 12], device, dtype), step);
        }
        let ks = [rows, 150, 75, 40, 20, 10];
        let gradient = random([70, 12], device, dtype);
        gradient_noise(x.clone(), g.clone(), gradient, NoiseStep { ks });
        for stored in [StoredInput::Half, StoredInput::Int8, StoredInput::Int4] {
            let packed = pack(
                x.clone(),
                PackStep {
                    stored,
                    seed: 1,
                    step: 0,
                },
            );
            let step = AopStep {
                k: 40,
                method: Method::Systematic,
                memory_precision: MemoryPrecision::Full,
                seed: 1,
                step: 0,
                bias: false,
                measure: false,
            };
            weight_gradient(packed.clone(), g.clone(), None, step);
            packed.unpack();
        }
    }
}

/// In a type: activations of one bit, and convolutions.
fn layers(device: &Device, dtype: DType) {
    let aop = AopConfig::new()
        .with_outer_products(OuterProducts::Count(20))
        .with_cost_rule(false);
    let linear = Cast(dtype).of(MemAopLinearConfig::new(70, 12).with_aop(aop).init(device));
    let hidden = linear.forward(random([300, 70], device, dtype).require_grad());
    (relu(hidden.clone()) + gelu(hidden)).sum().backward();

    let images = || {
        let normal = Distribution::Normal(0.0, 1.0);
        Tensor::<4>::random([3, 6, 9, 8], normal, (device, dtype)).require_grad()
    };
    for (groups, outer_products) in [(1, OuterProducts::Count(20)), (2, OuterProducts::Auto)] {
        let conv = MemAopConv2dConfig::new([6, 4], [3, 3])
            .with_groups(groups)
            .with_aop(aop.with_outer_products(outer_products))
            .init(device);
        let conv = Cast(dtype).of(conv);
        let observer = AopObserver::new(1);
        for _ in 0..2 {
            conv.forward(images()).sum().backward();
            observer.observe(&conv);
        }
    }
}

#[test]
fn shaders_are_valid_everywhere() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("kernels.txt");
    let logger = "[compilation]\nlogger = { level = \"full\", file = \"kernels.txt\" }\n";
    fs::write(folder.path().join("cubecl.toml"), logger).unwrap();
    let ran = Command::new(env::current_exe().unwrap())
        .args(["run_every_kernel", "--ignored", "--exact", "--nocapture"])
        .current_dir(&folder)
        .output()
        .unwrap();
    if !ran.status.success() {
        let message = String::from_utf8_lossy(&ran.stderr);
        let no_adapter = message.contains("no adapter");
        assert!(no_adapter && env::var_os("CI").is_none(), "{message}");
        eprintln!("skipped: no wgpu adapter");
        return;
    }

    let shaders = shaders(&fs::read_to_string(&log).unwrap());
    let seen: BTreeSet<_> = shaders.iter().map(|(name, _)| name.as_str()).collect();
    let all = BTreeSet::from(KERNELS);
    assert_eq!(seen, all);
    let spirv_val = Command::new("spirv-val").arg("--version").output().is_ok();
    if !spirv_val {
        eprintln!("without spirv-val: SPIR-V is not validated");
        assert!(env::var_os("CI").is_none(), "CI installs spirv-tools");
    }
    for (name, source) in &shaders {
        let shader = Shader::parse(name, source);
        shader.is_within_limits();
        shader.translate(spirv_val);
    }
    println!("{} variants of {} kernels", shaders.len(), seen.len());
}

/// The names and sources of the kernels of the crate in a log of CubeCL.
fn shaders(log: &str) -> BTreeSet<(String, String)> {
    let blocks = log.split("[START_KERNEL_COMPILATION]").skip(1);
    blocks
        .filter_map(|block| {
            let name = block.split_once("name: burn_memaop::op::cube::")?.1;
            let name = name.split(|c: char| c.is_whitespace() || c == '<').next()?;
            // Below its module and function stands the type of the kernel.
            let name = name.rsplit_once("::").map_or(name, |(name, _)| name);
            let source = block.split_once("```wgsl")?.1.split_once("```")?.0;
            Some((name.to_string(), source.to_string()))
        })
        .collect()
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
            // Where the adapter has integers of 64 bits, CubeCL takes the upper halves of products from them, whatever the
            // device was asked for, and puts them together from 16 bits where not.
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

    /// To MSL, HLSL and SPIR-V.
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
