--- @include lib/basics/counters
--- @include lib/checkpoint/history
--- @include lib/queue/forget

-- A request begins again from zero, in a new epoch: by that, readers tell the new outputs from the old ones.
local function restart(id, reason, execution)
  local name = KEY.job .. id
  local offset = redis.call('HGET', KEY.checkpoint .. id, 'offset')
  local had = offset or redis.call('EXISTS', KEY.output .. id) == 1
  redis.call('DEL', KEY.output .. id)
  drop_checkpoint(id)
  if not had then return end
  redis.call('HDEL', name, 'best_offset', 'best_seq')
  add(name, 'epoch', 1)
  history(id, 'restart', '', execution or '', offset or '0', '', reason)
  count('restarts', redis.call('HGET', name, 'origin') or '')
end
