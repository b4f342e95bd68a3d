-- Whether a request, or a plain job, runs. Nothing else says so: its hash names an execution, and its holder's index
-- has the same one. If only the hash does, a claim stopped halfway; if only the index does, the id was deleted, and
-- perhaps used again.
local function runs(id, execution, holder)
  return (execution or '') ~= '' and redis.call('HGET', KEY.held .. (holder or ''), id) == execution
end
