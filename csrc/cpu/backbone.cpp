// The network up to its feature maps on the CPU, by one team of threads.
#include "ops/backbone.h"

#include "cpu/team.h"
#include "ops/kernel_of.h"
#include "registration.h"

namespace mobilemamba::cpu {
namespace {

std::vector<at::Tensor> backbone_cpu(const BackboneArguments& arguments) {
  // torch's products, which compute float64, have their own threads
  if (arguments.input.scalar_type() == at::kDouble) return backbone_composed(arguments);
  arguments.check();
  BackboneArguments a = arguments;
  a.input = channels_contiguous(a.input);
  std::vector<at::Tensor> maps;
  with_team([&] { maps = backbone_composed(a); });
  return maps;
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CPU, m) {
  m.impl("backbone", kernel_of<backbone, backbone_cpu>);
}

}  // namespace mobilemamba::cpu
