--- @include lib/counters
--- @include lib/void

-- A write by an execution that is not the current one is refused. queue: as the hash has it, nil without a hash.
local function refuse(id, execution, incarnation, queue)
  void(id, execution, incarnation, queue)
  count('fenced', queue or '')
  return 'lost'
end
