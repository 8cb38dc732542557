// Runs an AOTInductor package without Python.
//
//   run_package PACKAGE.pt2 CALLS.pt RESULTS.pt DEVICE
//
// CALLS.pt, written by Python's torch.save, is a list of calls, each a list of CPU tensors: the program's tensor inputs
// in order. RESULTS.pt, for torch.load, is a tuple of results, each a tuple of CPU tensors. DEVICE is where the
// package was compiled for: "cpu" or "cuda".

#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

namespace {

c10::IValue read_pickle(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path);
  }
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  return torch::jit::pickle_load(bytes);
}

void write_pickle(const std::string& path, const c10::IValue& value) {
  const std::vector<char> bytes = torch::jit::pickle_save(value);
  std::ofstream file(path, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size())).flush()) {
    throw std::runtime_error("cannot write " + path);
  }
}

// A Python list of tensors arrives as List[Tensor] or as List[Any], depending on the pickler.
std::vector<at::Tensor> tensors_of(const c10::IValue& call, const std::string& device) {
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& item : call.toListRef()) {
    tensors.push_back(item.toTensor().to(at::Device(device)));
  }
  return tensors;
}

c10::IValue result_of(const std::vector<at::Tensor>& outputs) {
  std::vector<c10::IValue> items;
  for (const at::Tensor& output : outputs) {
    items.emplace_back(output.cpu());
  }
  return c10::ivalue::Tuple::create(std::move(items));
}

// The names of the Python libraries mapped into this process; what the test wants to see is none.
std::string python_libraries() {
  std::ifstream maps("/proc/self/maps");
  std::string line, found;
  while (std::getline(maps, line)) {
    if (line.find("libpython") != std::string::npos || line.find("libtorch_python") != std::string::npos) {
      found += line + "\n";
    }
  }
  return found;
}

void run(const std::string& package, const std::string& calls, const std::string& results, const std::string& device) {
  torch::inductor::AOTIModelPackageLoader loader(package);
  std::vector<c10::IValue> answers;
  const c10::IValue requests = read_pickle(calls);
  for (const c10::IValue& call : requests.toListRef()) {
    answers.push_back(result_of(loader.run(tensors_of(call, device))));
  }
  write_pickle(results, c10::ivalue::Tuple::create(std::move(answers)));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: run_package PACKAGE.pt2 CALLS.pt RESULTS.pt DEVICE\n";
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3], argv[4]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  const std::string python = python_libraries();
  std::cerr << python;
  return python.empty() ? 0 : 3;
}
